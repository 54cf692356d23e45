"""The machine: GPUs where there are some, else the processors; and each rank."""

from engine.control import Gpu, RankLoad, Telemetry
from rlhf_tui import format as fmt
from rlhf_tui.widgets import book as facts
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.panel import Panel, bar, heading


class Machine(Panel):
    """A line for each device and each rank, as many as fit."""

    def rows(self, width: int, height: int) -> list[Row]:
        """Devices before ranks."""
        telemetry = self.book.telemetry
        top = heading("Machine", "", width)
        if telemetry is None:
            return [top, *self._without()]
        wide = max(min(width - 38, 16), 4)
        lines = [_gpu(g, wide) for g in telemetry.gpus]
        lines += _host(telemetry, wide) if not lines or height > len(lines) + 2 else []
        lines += [_rank(r, wide) for r in telemetry.ranks]
        if len(lines) > height - 1:
            hidden = len(lines) - (height - 2)
            lines = [*lines[: height - 2], [(f" … {hidden} more", "dim")]]
        return [top, *lines]

    def _without(self) -> list[Row]:
        peak = self.book.series(facts.MEMORY).last
        row: Row = [(" peak memory ", "dim"), (f"{peak:.2f} GB", "")] if peak is not None else []
        words = "waiting for the engine" if self.book.live else "no engine runs"
        return [[(f" {words}", "dim")], *([row] if row else [])]


def _meter(name: str, percent: float, width: int) -> Row:
    tone = "warn" if percent >= 97 else "accent"
    return [
        (f" {name:<7}", "dim"),
        *bar(percent / 100, width, tone),
        (f" {percent:3.0f}%", "strong"),
    ]


def _gpu(gpu: Gpu, width: int) -> Row:
    row = [*_meter(f"GPU {gpu.index}", gpu.utilisation, width)]
    row.append((f"  {gpu.memory_used / 1e9:.1f}/{gpu.memory_total / 1e9:.0f} GB", ""))
    if gpu.temperature is not None:
        row.append((f"  {gpu.temperature:.0f}°C", "warn" if gpu.temperature >= 85 else "dim"))
    if gpu.power is not None:
        row.append((f"  {gpu.power:.0f} W", "dim"))
    return row


def _host(telemetry: Telemetry, width: int) -> list[Row]:
    share = 100 * telemetry.memory_used / max(telemetry.memory_total, 1)
    used = f"  {telemetry.memory_used / 1e9:.1f}/{telemetry.memory_total / 1e9:.0f} GB"
    return [
        [
            *_meter("CPU", telemetry.cpu, width),
            (f"  disk {fmt.size(telemetry.disk_free)} free", "dim"),
        ],
        [*_meter("memory", share, width), (used, "")],
    ]


def _rank(rank: RankLoad, width: int) -> Row:
    return [
        (f" rank {rank.rank:<2}", "dim"),
        (f"{'pid ' + str(rank.pid):<{width}} ", "dim"),
        (f"{rank.cpu:3.0f}%", "strong"),
        (f"  {rank.memory / 1e9:.1f} GB", ""),
    ]
