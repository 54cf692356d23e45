"""What the parts of the GPU check find, and the file and the table that keep it."""

import json
import re
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


def run_parts(parts: dict[str, Part], target: Target) -> Iterator[Finding]:
    """Runs all parts, prints each finding at once, and goes on after a part that raises."""
    for name, part in parts.items():
        began = time.perf_counter()
        try:
            for finding in part(target):
                print(line(finding), flush=True)
                yield finding
        except Exception as error:  # a part must not keep the others from running
            text = "".join(traceback.format_exception(error)[-3:])
            failed = Finding(name, passed=False, measured=f"{type(error).__name__}: {error}")
            print(f"{line(failed)}\n{text}", flush=True)
            yield failed
        print(f"{'':<8}{name}: {time.perf_counter() - began:.0f} s", flush=True)


def line(finding: Finding) -> str:
    """A line of the table."""
    return f"{'ok' if finding.passed else 'FAILED':<8}{finding.name}: {finding.measured}"


def write_results(kind: str, findings: list[Finding], *, folder: Path = RESULTS) -> Path:
    """Writes `gpu-DEVICE-DATE-KIND.json`, and beside it a paragraph for RESULTS.md.

    Args:
        kind: `check` or `bench`.
        findings: all of them.
        folder: where to.

    Returns:
        The JSON file's path.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    today = datetime.now(UTC).date().isoformat()
    stem = f"gpu-{re.sub('[^A-Za-z0-9]+', '-', name).lower()}-{today}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    described = machine.describe()
    document = {
        "device": name,
        "date": today,
        "machine": described.splitlines(),
        "findings": [asdict(finding) for finding in findings],
    }
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    failed = [f.name for f in findings if not f.passed]
    paragraph = [
        f"`make gpu-{kind}`, {today}, {name}: {len(findings) - len(failed)} of {len(findings)} "
        f"as they should be{'; not: ' + ', '.join(failed) if failed else ''}.",
        "",
        "```",
        described,
        "",
        *map(line, findings),
        "```",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(paragraph))
    return path
