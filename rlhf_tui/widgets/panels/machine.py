"""The machine: GPUs where there are some, else the processors; and each rank."""

from engine import metrics
from engine.protocol.client_messages import Gpu, RankLoad, Telemetry
from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Piece, Row, row_width
from rlhf_tui.widgets.panels.panel import Panel, bar, heading

SHORT, SHORTEST = 23, 19
"""Cells of a GPU in few words, and in fewer."""
PHASE_BARS = {"generate": ("█", "s1"), "score": ("▓", "s2"), "reference": ("▒", "s3"),
          "optimise": ("░", "s4")}  # fmt: skip
"""How a phase is drawn in a rank's bar; the characters tell them apart without colours."""
BEHIND = 1.05
"""Times the next slowest rank's seconds from which on a rank is called the slowest."""


class MachinePanel(Panel):
    """A line for each device and each rank, as many as fit."""

    def wanted(self) -> int:
        """Lines that would show everything."""
        telemetry = self.state.telemetry
        if telemetry is None:
            return 3
        return 3 + len(telemetry.gpus) + len(telemetry.ranks)

    def rows(self, width: int, height: int) -> list[Row]:
        """Devices before ranks; the slowest rank is never left out."""
        telemetry = self.state.telemetry
        if telemetry is None:
            return [heading("Machine", "", width), *self._without()]
        top = heading("Machine", _legend(telemetry, width), width)
        ranks, room = telemetry.ranks, height - 1
        wide = max(min(width - 38, 16), 4)
        devices = [_gpu(g, wide) for g in telemetry.gpus]
        if len(devices) + len(ranks) > room:
            devices = _packed(telemetry.gpus, width)
        host = _host(telemetry, wide)
        if not devices or room >= len(devices) + len(ranks) + len(host):
            devices += host
        if ranks:
            devices = devices[: max(room - 1, 0)]
        shown = room - len(devices)
        # The last line says how many are not seen, where there is more than one line for them.
        shown -= 1 if 1 < shown < len(ranks) else 0
        hidden = len(ranks) - shown if shown < len(ranks) else 0
        late = slowest(ranks)
        chosen = sorted(ranks, key=lambda r: (r.rank != late, r.rank))[: max(shown, 0)]
        lines = [self._rank(r, ranks, width) for r in sorted(chosen, key=lambda r: r.rank)]
        more: list[Row] = [[(f" … {hidden} more ranks", "dim")]] if hidden else []
        return [top, *devices, *lines, *more][:height]

    def _without(self) -> list[Row]:
        peak = self.state.series(metrics.PEAK_MEMORY).last
        row: Row = [(" peak memory ", "dim"), (f"{peak:.2f} GB", "")] if peak is not None else []
        words = "waiting for the engine" if self.state.live else "no engine is running"
        return [[(f" {words}", "dim")], *([row] if row else [])]

    def _rank(self, rank: RankLoad, ranks: list[RankLoad], width: int) -> Row:
        row: list[Piece] = [(f" rank {rank.rank:<2} ", "dim")]
        late = slowest(ranks)
        if rank.seconds:
            blocks = min(max(width - 44, 8), 24)
            row += [*_blocks(rank, blocks, max(_total(r) for r in ranks))]
            row.append((f" {_total(rank):5.1f}s", "strong"))
            if late is not None:
                row.append((" slowest" if rank.rank == late else " " * 8, "warn"))
        else:
            row.append((f"{'pid ' + str(rank.pid) if rank.pid else '':<12}", "dim"))
        words_of = (
            [f"{rank.cpu:4.0f}%", f" {rank.memory / 1e9:.1f} GB"] if rank.pid else [" elsewhere"]
        )
        if rank.peak_memory:
            words_of.insert(1, f" peak {rank.peak_memory / 1e9:.1f} GB")
        for words in words_of:
            if row_width(row) + len(words) <= width:
                row.append((words, ""))
        return row


def slowest(ranks: list[RankLoad]) -> int | None:
    """The rank the others wait for, by the seconds of its own phases; None where none stands out.

    A rank's phases end at the collectives, so that its sum is its own work.
    """
    order = sorted(ranks, key=_total)
    if len(order) < 2 or _total(order[-1]) <= _total(order[-2]) * BEHIND:
        return None
    return order[-1].rank


def _total(rank: RankLoad) -> float:
    return sum(rank.seconds.values())


def _blocks(rank: RankLoad, width: int, longest: float) -> list[Piece]:
    """Its seconds by phase, on the scale of the longest rank's."""
    found: list[Piece] = []
    done, used = 0.0, 0
    for name, (char, tone) in PHASE_BARS.items():
        done += rank.seconds.get(name, 0.0)
        end = round(done / longest * width) if longest else 0
        found.append((char * (end - used), tone))
        used = end
    return [*found, ("·" * (width - used), "dim")]


def _legend(telemetry: Telemetry, width: int) -> str:
    if not any(r.seconds for r in telemetry.ranks):
        return ""
    names = [f"{char} {name}" for name, (char, _) in PHASE_BARS.items()]
    words = " ".join(names)
    return words if len(words) < width - 12 else " ".join(n[:5] for n in names)


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
        row.append((f"  {gpu.temperature:.0f}°C", _heat(gpu.temperature)))
    if gpu.power is not None:
        row.append((f"  {gpu.power:.0f} W", "dim"))
    return row


def _packed(gpus: list[Gpu], width: int) -> list[Row]:
    """In few words, as many beside one another as fit."""
    cells = SHORT if width >= 2 * SHORT else SHORTEST
    beside = max(width // cells, 1)
    short = [_short(g, cells) for g in gpus]
    return [
        [piece for one in short[i : i + beside] for piece in one]
        for i in range(0, len(short), beside)
    ]


def _short(gpu: Gpu, cells: int) -> list[Piece]:
    memory = f" {gpu.memory_used / 1e9:.0f}/{gpu.memory_total / 1e9:.0f}G"
    heat = "" if gpu.temperature is None else f" {gpu.temperature:.0f}°"
    row: list[Piece] = [
        (f" GPU {gpu.index:<2}" if cells == SHORT else f" {gpu.index:<1}", "dim"),
        (f"{gpu.utilisation:4.0f}%", "strong"),
        (memory, ""),
        (heat, "dim" if gpu.temperature is None else _heat(gpu.temperature)),
    ]
    return [*row, (" " * (cells - row_width(row)), "")]


def _heat(celsius: float) -> str:
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
