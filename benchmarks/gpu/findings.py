"""What the parts of the GPU check find, and the file and the table that keep it."""

import json
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import machine

RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Target:
    """Where the parts run, and how large they are."""

    device: torch.device
    """The GPU, real or pretended."""
    real: bool
    """False on a machine without a GPU: the parts run at a small size, to show that they do."""
    folder: Path
    """For sessions and models; removed afterwards."""

    @property
    def launch_device(self) -> str:
        """The value of `launch.device` for whole runs: processes cannot pretend."""
        return "cuda" if self.real else "cpu"


@dataclass(frozen=True)
class Finding:
    """One property: whether it holds, and by how much."""

    name: str
    passed: bool
    measured: str
    """In words and figures, for the table."""
    figures: dict[str, float] = field(default_factory=dict)


Part = Callable[[Target], Iterable[Finding]]


def below(name: str, value: float, limit: float, unit: str = "") -> Finding:
    """A finding that a value is at most a limit; NaN fails."""
    text = f"{value:.3g}{unit}, at most {limit:g}{unit} allowed"
    return Finding(name, value <= limit, text, {"value": value, "limit": limit})


def run_parts(
    parts: dict[str, Part], target: Target, keep: Callable[[Finding], None] | None = None
) -> Iterator[Finding]:
    """Runs all parts, prints and keeps each finding at once, and goes on after a part that raises.

    Args:
        parts: by name.
        target: where they run.
        keep: called with each finding, so that none is lost if a time limit ends the process.
    """
    for name, part in parts.items():
        began = time.perf_counter()
        for finding in _findings(name, part, target):
            print(line(finding), flush=True)
            if keep is not None:
                keep(finding)
            yield finding
        print(f"{'':<8}{name}: {time.perf_counter() - began:.0f} s", flush=True)


def _findings(name: str, part: Part, target: Target) -> Iterator[Finding]:
    try:
        yield from part(target)
    except Exception as error:  # a part must not keep the others from running
        print("".join(traceback.format_exception(error)[-3:]), flush=True)
        yield Finding(name, passed=False, measured=f"{type(error).__name__}: {error}")


def chosen_parts(parts: dict[str, Part], text: str) -> dict[str, Part]:
    """The parts whose name contains a text.

    Raises:
        SystemExit: there are none; with the names of all.
    """
    chosen = {name: part for name, part in parts.items() if text in name}
    if not chosen:
        print(f"no part contains '{text}'; there are: {', '.join(parts)}", file=sys.stderr)
        sys.exit(2)
    return chosen


def line(finding: Finding) -> str:
    """A line of the table."""
    return f"{'ok' if finding.passed else 'FAILED':<8}{finding.name}: {finding.measured}"


class Results:
    """Writes `gpu-DEVICE-DATE-KIND.json`, and beside it a paragraph for RESULTS.md.

    Both are complete after each :meth:`add`, which several threads may call.
    """

    def __init__(self, kind: str, only: str = "", *, folder: Path = RESULTS) -> None:
        """Writes nothing yet.

        Args:
            kind: `check` or `bench`.
            only: the value of `--only`; such a file does not replace that of a whole run.
            folder: where to.
        """
        self._kind = kind
        self._device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        self._date = datetime.now(UTC).date().isoformat()
        words = f"gpu {self._device} {self._date} {kind} {only}"
        self.path = folder / f"{re.sub('[^A-Za-z0-9]+', '-', words).strip('-').lower()}.json"
        self._machine = machine.describe()
        self._findings: list[Finding] = []
        self._lock = threading.Lock()

    def add(self, finding: Finding) -> None:
        """Writes both files with this finding and those before it."""
        with self._lock:
            self._findings.append(finding)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            document = {
                "device": self._device,
                "date": self._date,
                "machine": self._machine.splitlines(),
                "findings": [asdict(each) for each in self._findings],
            }
            _replace(self.path, json.dumps(document, indent=1) + "\n")
            _replace(self.path.with_suffix(".md"), self._paragraph())

    def _paragraph(self) -> str:
        found = self._findings
        failed = [f.name for f in found if not f.passed]
        lines = [
            f"`make gpu-{self._kind}`, {self._date}, {self._device}: {len(found) - len(failed)} of "
            f"{len(found)} as they should be{'; not: ' + ', '.join(failed) if failed else ''}.",
            "",
            "```",
            self._machine,
            "",
            *map(line, found),
            "```",
            "",
        ]
        return "\n".join(lines)


def _replace(path: Path, text: str) -> None:
    """Writes a file whole: a process that is killed meanwhile leaves the one before."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
