"""A side of a comparison: a child process that does one iteration per request.

The parent writes ``go`` or ``count`` to the child's stdin and reads lines of JSON from its stdout.
All sides stay loaded and take turns, so that other load on the machine affects all of them alike.
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

OFFLINE = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
NO_TRL = "TRL 1.12, the last version with a PPOTrainer, is not installed (make bench-extra)"


def has_ppo_trainer() -> bool:
    """Whether a TRL with a PPOTrainer is installed."""
    try:
        return find_spec("trl.experimental.ppo") is not None
    except ModuleNotFoundError:  # no TRL
        return False


def _onednn_linear_flop(x: Any, weight: Any, *_args: Any, **_named: Any) -> int:
    """Operations of oneDNN's linear operator, which FlopCounterMode does not know, from shapes."""
    return 2 * x[0] * x[1] * weight[0]


def _addmm_flop(_total: Any, a: Any, b: Any, *_args: Any, **_named: Any) -> int:
    """Operations of `addmm_`, which it does not know either."""
    return 2 * a[0] * a[1] * b[1]


_UNKNOWN: dict[Any, Any] = {torch.ops.aten.addmm_: _addmm_flop}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _UNKNOWN[torch.ops.mkldnn._linear_pointwise] = _onednn_linear_flop


@dataclass(frozen=True)
class Iteration:
    """The measurements of one iteration of a side."""

    seconds: float
    cpu: float
    """Seconds of processor time of all threads; comparable on a machine with other load."""
    peak_gb: float
    """Peak memory of the process so far in GB (1e9 bytes): resident, or allocated on the GPU."""
    gflop: float = 0.0
    """Arithmetic of the matrix products; 0 if it was not counted."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, if known."""


class Side:
    """The parent's handle of a child process."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Starts `python -m module arguments`; its stderr is written to `log`."""
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
        """Waits until the child has loaded. Raises RuntimeError if it ends."""
        self._receive()

    def iterate(self, *, keep: bool = True) -> Iteration:
        """Runs one iteration. Pass `keep=False` for the warm-up."""
        iteration = self._request("go")
        if keep:
            self.iterations.append(iteration)
        return iteration

    def count_flop(self) -> None:
        """Runs one more iteration to count its arithmetic; counting costs time and memory."""
        self.gflop = self._request("count").gflop

    def _request(self, request: str) -> Iteration:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        return Iteration(**self._receive())

    def close(self) -> None:
        """Kills the child."""
        self._process.kill()
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}:\n{last}")
        return json.loads(line)


class Child:
    """The child's side of the protocol: waits for requests, measures, and sends the results."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not mix with the results
        self._gpu = torch.cuda.is_available()

    def ready(self) -> None:
        """Reports that loading is complete."""
        self._send({})

    @contextmanager
    def iteration(self) -> Iterator[dict[str, float]]:
        """Context for one iteration; write the seconds of its phases into the yielded dictionary.

        Raises:
            SystemExit: the parent has closed the pipe.
        """
        self.wait()
        phases: dict[str, float] = {}
        yield phases
        self.done(phases)

    def wait(self) -> None:
        """Waits for a request and starts the clock. Raises SystemExit if the pipe is closed."""
        request = sys.stdin.readline()
        if not request:
            sys.exit(0)
        count = request.strip() == "count"
        self._counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN) if count else None
        if self._counter is not None:
            self._counter.__enter__()
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def done(self, phases: dict[str, float]) -> None:
        """Stops the clock and sends the measurements."""
        if self._gpu:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        gflop = 0.0
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            gflop = self._counter.get_total_flops() / 1e9
        self._send(asdict(Iteration(seconds, cpu, self._peak(), gflop, phases)))

    def _peak(self) -> float:
        if self._gpu:
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def _send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()
