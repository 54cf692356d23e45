"""A side of a comparison: a process of its own that does one iteration each time it is told to.

Parent and child speak lines of JSON over the child's stdin and stdout. All sides stay loaded and
take turns, so that whatever else the machine does falls on all of them alike.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

OFFLINE = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def _product_flop(x: Any, weight: Any, *_args: Any, **_named: Any) -> int:
    """Of oneDNN's linear operator, which the counter does not know; from shapes."""
    return 2 * x[0] * x[1] * weight[0]


_ONEDNN = (
    {torch.ops.mkldnn._linear_pointwise: _product_flop}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else {}
)


@dataclass(frozen=True)
class Iteration:
    """What a side tells of one iteration."""

    seconds: float
    cpu: float
    """Seconds of processor time, of all threads: what counts on a machine that others use."""
    peak_gb: float
    """The most the process ever held: resident, or of the GPU's memory (1e9 bytes)."""
    gflop: float = 0.0
    """Arithmetic of its matrix products, where it was counted."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of its parts, where known."""


class Side:
    """The parent's end."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Starts `python -m module arguments`; what it prints besides goes to `log`."""
        self.name = name
        self._log = log
        self.iterations: list[Iteration] = []
        self.gflop = 0.0
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=(environment or dict(os.environ)) | OFFLINE,
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Until it has loaded."""
        self._hear()

    def iterate(self, *, keep: bool = True) -> Iteration:
        """One iteration; the first should not be kept."""
        heard = self._turn("go")
        if keep:
            self.iterations.append(heard)
        return heard

    def count(self) -> None:
        """One more, in which the arithmetic is counted: that costs time and memory of its own."""
        self.gflop = self._turn("count").gflop

    def _turn(self, word: str) -> Iteration:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return Iteration(**self._hear())

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}:\n{last}")
        return json.loads(line)


class Child:
    """The child's end: waits for each turn, times it, and tells."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints must not get between our lines
        self._gpu = torch.cuda.is_available()

    def ready(self) -> None:
        """Loading is over."""
        self._tell({})

    @contextmanager
    def turn(self) -> Iterator[dict[str, float]]:
        """One iteration; the dictionary handed out takes the seconds of its parts.

        Raises:
            SystemExit: the parent has closed the line.
        """
        self.wait()
        phases: dict[str, float] = {}
        yield phases
        self.done(phases)

    def wait(self) -> None:
        """Until told to go; the clock runs from here. Raises SystemExit."""
        word = sys.stdin.readline()
        if not word:
            sys.exit(0)
        count = word.strip() == "count"
        self._counter = FlopCounterMode(display=False, custom_mapping=_ONEDNN) if count else None
        if self._counter is not None:
            self._counter.__enter__()
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def done(self, phases: dict[str, float]) -> None:
        """The iteration is over."""
        if self._gpu:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        gflop = 0.0
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            gflop = self._counter.get_total_flops() / 1e9
        self._tell(asdict(Iteration(seconds, cpu, self._peak(), gflop, phases)))

    def _peak(self) -> float:
        if self._gpu:
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def _tell(self, what: dict[str, Any]) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()
