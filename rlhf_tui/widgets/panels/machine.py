"""The machine panel: GPUs or CPU, memory and disk, and the load of each rank."""

from engine import metrics
from engine.protocol.client_messages import Gpu, RankLoad, Telemetry
from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Piece, Row, row_width
from rlhf_tui.widgets.panels.panel import Panel, bar, heading

SHORT, SHORTEST = 23, 19
"""Cells of a GPU in the two compact forms."""
PHASE_BARS = {
    "sync": ("▞", "s5"), "generate": ("█", "s1"), "score": ("▓", "s2"), "reference": ("▒", "s3"),
    "fit": ("▚", "s6"), "optimise": ("░", "s4"),
}  # fmt: skip
"""Character and tone of a phase in a rank's bar. The characters differ for use without colour."""
SLOW_RANK_FACTOR = 1.05
"""A rank is marked as the slowest above this multiple of the second slowest rank's seconds."""


class MachinePanel(Panel):
    """One line per device and rank, as many as fit."""

    def wanted(self) -> int:
        """The number of lines that show everything."""
        telemetry = self.state.telemetry
        if telemetry is None:
            return 3
        return 3 + len(telemetry.gpus) + len(telemetry.ranks)

    def rows(self, width: int, height: int) -> list[Row]:
        """Devices, then ranks. The slowest rank is always included."""
        telemetry = self.state.telemetry
        if telemetry is None:
            return [heading("Machine", "", width), *self._no_telemetry()]
        top = heading("Machine", _legend(telemetry, width), width)
        ranks, room = telemetry.ranks, height - 1
        bar_width = max(min(width - 38, 16), 4)
        devices = [_gpu(g, bar_width, width) for g in telemetry.gpus]
        if len(devices) + len(ranks) > room:
            devices = _packed(telemetry.gpus, width)
        host = _host(telemetry, bar_width)
        if not devices or room >= len(devices) + len(ranks) + len(host):
            devices += host
        if ranks:
            devices = devices[: max(room - 1, 0)]
        shown = room - len(devices)
        # The last of several lines for ranks has the number of hidden ranks.
        shown -= 1 if 1 < shown < len(ranks) else 0
        hidden = len(ranks) - shown if shown < len(ranks) else 0
        slow = slowest(ranks)
        visible = sorted(ranks, key=lambda r: (r.rank != slow, r.rank))[: max(shown, 0)]
        lines = [self._rank(r, ranks, width) for r in sorted(visible, key=lambda r: r.rank)]
        more: list[Row] = [[(f" … {fmt.plural(hidden, 'more rank')}", "dim")]] if hidden else []
        return [top, *devices, *lines, *more][:height]

    def _no_telemetry(self) -> list[Row]:
        peak = self.state.curves.series(metrics.PEAK_MEMORY).last
        row: Row = [(" peak memory ", "dim"), (f"{peak:.2f} GB", "")] if peak is not None else []
        status = "waiting for the engine" if self.state.live else "no engine is running"
        return [[(f" {status}", "dim")], *([row] if row else [])]

    def _rank(self, rank: RankLoad, ranks: list[RankLoad], width: int) -> Row:
        row: list[Piece] = [(f" rank {rank.rank:<2} ", "dim")]
        slow = slowest(ranks)
        if rank.seconds:
            blocks = min(max(width - 44, 8), 24)
            row += [*_blocks(rank, blocks, max(_total(r) for r in ranks))]
            row.append((f" {_total(rank):5.1f}s", "strong"))
            if slow is not None:
                row.append((" slowest" if rank.rank == slow else " " * 8, "warn"))
        else:
            row.append((f"{'pid ' + str(rank.pid) if rank.pid else '':<12}", "dim"))
        values = [f"CPU {rank.cpu:.0f}%"] if rank.pid else ["elsewhere"]
        if rank.peak_memory:
            peak = f"peak {rank.peak_memory / 1e9:.1f} GB"
            # On a GPU it says more than the processor; the process's memory is another one.
            values.insert(0 if rank.on_gpu else 1, f"GPU {peak}" if rank.on_gpu else peak)
        if rank.pid:
            which = ("host " if rank.on_gpu else "now ") if rank.peak_memory else ""
            values.append(f"{which}{rank.memory / 1e9:.1f} GB")
        gap = " "
        for value in values:
            if row_width(row) + len(gap + value) <= width:
                row.append((gap + value, ""))
                gap = "  "
        return row


def slowest(ranks: list[RankLoad]) -> int | None:
    """The rank that the others wait for; None if none exceeds the next by more than 5 %.

    Compares the sums of the ranks' phases. These end before the collectives, so they include no
    waiting.
    """
    order = sorted(ranks, key=_total)
    if len(order) < 2 or _total(order[-1]) <= _total(order[-2]) * SLOW_RANK_FACTOR:
        return None
    return order[-1].rank


def _total(rank: RankLoad) -> float:
    return sum(rank.seconds.values())


def _blocks(rank: RankLoad, width: int, longest: float) -> list[Piece]:
    """A bar of the seconds by phase; `longest` seconds fill `width` cells."""
    blocks: list[Piece] = []
    done, used = 0.0, 0
    for name, (char, tone) in PHASE_BARS.items():
        done += rank.seconds.get(name, 0.0)
        end = round(done / longest * width) if longest else 0
        blocks.append((char * (end - used), tone))
        used = end
    return [*blocks, ("·" * (width - used), "dim")]


def _legend(telemetry: Telemetry, width: int) -> str:
    measured = {name for rank in telemetry.ranks for name in rank.seconds}
    if not measured:
        return ""
    names = [f"{char} {name}" for name, (char, _) in PHASE_BARS.items() if name in measured]
    legend = " ".join(names)
    return legend if len(legend) < width - 12 else " ".join(n[:5] for n in names)


def _meter(name: str, percent: float | None, width: int) -> Row:
    tone = "warn" if percent is not None and percent >= 97 else "accent"
    return [
        (f" {name:<7}", "dim"),
        *bar((percent or 0.0) / 100, width, tone),
        (f" {_percent(percent)}", "strong"),
    ]


def _percent(value: float | None) -> str:
    """Four cells; a dash for what is not measured."""
    return "   –" if value is None else f"{value:3.0f}%"


def _gpu(gpu: Gpu, bar_width: int, width: int) -> Row:
    row = [*_meter(f"GPU {gpu.index}", gpu.utilisation, bar_width)]
    if gpu.memory_total:
        row.append((f"  {gpu.memory_used / 1e9:.1f}/{gpu.memory_total / 1e9:.0f} GB", ""))
    if gpu.temperature is not None:
        row.append((f"  {gpu.temperature:.0f}°C", _temperature_tone(gpu.temperature)))
    power = "" if gpu.power is None else f"  {gpu.power:.0f} W"
    if row_width(row) + len(power) <= width:  # cut off it would be another number
        row.append((power, "dim"))
    return row


def _packed(gpus: list[Gpu], width: int) -> list[Row]:
    """GPUs in the compact form, as many per line as fit."""
    cells = SHORT if width >= 2 * SHORT else SHORTEST
    per_line = max(width // cells, 1)
    compact = [_compact(g, cells) for g in gpus]
    return [
        [piece for gpu in compact[i : i + per_line] for piece in gpu]
        for i in range(0, len(compact), per_line)
    ]


def _compact(gpu: Gpu, cells: int) -> list[Piece]:
    memory = ""
    if gpu.memory_total:
        memory = f" {gpu.memory_used / 1e9:.0f}/{gpu.memory_total / 1e9:.0f}G"
    heat = "" if gpu.temperature is None else f" {gpu.temperature:.0f}°"
    row: list[Piece] = [
        (f" GPU {gpu.index:<2}" if cells == SHORT else f" {gpu.index:<1}", "dim"),
        (f" {_percent(gpu.utilisation)}", "strong"),
        (memory, ""),
        (heat, "dim" if gpu.temperature is None else _temperature_tone(gpu.temperature)),
    ]
    return [*row, (" " * (cells - row_width(row)), "")]


def _temperature_tone(celsius: float) -> str:
    return "warn" if celsius >= 85 else "dim"


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
