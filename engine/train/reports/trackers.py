"""Experiment trackers (`log.trackers`): sends the metrics of each step to a separate process."""

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from engine.config.file import flatten, to_tree
from engine.config.schema import RunConfig
from engine.errors import LinkError
from engine.launch.environment import LOG_ENCODING, clean_environment
from engine.protocol.rank_messages import Sample
from engine.session.access import make_folders, open_to_append
from engine.session.folder import SessionFolder

PROGRAM = "engine.train.reports.tracker_program"
MAX_PENDING = 10_000
"""Number of steps that wait for the trackers at most; further ones are dropped."""
LEFT_OUT = ("RLHF_TUI_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MASTER_")
"""Prefixes of variables that would make accelerate look for other processes."""
CLOSE_TIMEOUT = 70.0
"""Seconds that the end of a run waits for trackers; the program ends itself a little earlier."""
Notify = Callable[[int, str], None]
"""Called from another thread with the last step and one line."""


class TrackerProcess:
    """The process that runs the trackers.

    The process can neither end nor delay the run: metrics wait in a queue, and problems become
    notices, one for each tracker.
    """

    def __init__(self, session: SessionFolder, config: RunConfig, notify: Notify) -> None:
        """Starts the process. Raises OSError if its folder cannot be written."""
        self._notify = notify
        self._step = 0
        self._dropped = False
        self._closing = False
        make_folders(session.trackers)
        with open_to_append(session.trackers / "trackers.log") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                # -P: a folder that a tracker creates here must not be imported as a package.
                [sys.executable, "-P", "-m", PROGRAM],
                cwd=session.trackers,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # it outlives a rank that is killed, and sends what is left
            )
        header = {
            "trackers": config.log.trackers,
            "project": config.log.project,
            "session": session.name,
            "config": shown_config(config),
        }
        self._pending: queue.Queue[bytes | None] = queue.Queue(MAX_PENDING)
        self._pending.put(msgspec.json.encode(header))
        self._writer = threading.Thread(target=self._write, name="trackers", daemon=True)
        self._writer.start()
        self._reader = threading.Thread(target=self._read, name="tracker problems", daemon=True)
        self._reader.start()

    def step(self, step: int, metrics: dict[str, float], samples: list[Sample]) -> None:
        """Passes the metrics of a step on; returns at once."""
        del samples
        self._step = step
        try:
            # This encoder writes null for numbers that are not finite.
            self._pending.put_nowait(msgspec.json.encode({"step": step, "metrics": metrics}))
        except queue.Full:
            if not self._dropped:
                self._dropped = True
                self._report(
                    f"trackers are {MAX_PENDING} steps behind: they miss steps from {step} on"
                )

    def close(self) -> None:
        """Waits until the trackers have everything, at most :data:`CLOSE_TIMEOUT`."""
        self._closing = True
        end = time.monotonic() + CLOSE_TIMEOUT
        with contextlib.suppress(queue.Full):
            self._pending.put(None, timeout=CLOSE_TIMEOUT)
        try:
            status = self._process.wait(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        # The pipe has ended, unless a process that a tracker started holds it open.
        self._reader.join(max(1.0, end - time.monotonic()))
        if status:
            self._report("trackers did not finish in time: the last steps may be missing there")

    def _write(self) -> None:
        """Writes pending metrics to the process, as fast as it reads them."""
        if self._process.stdin is None:
            return
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # `_read` reports its end
            while (line := self._pending.get()) is not None:
                pipe.write(line + b"\n")
                pipe.flush()

    def _read(self) -> None:
        """Reports the problems that the process writes, and its end."""
        if self._process.stdout is None:
            return
        for line in self._process.stdout:
            self._report(line.decode("utf-8", "replace").strip())
        if not self._closing:
            self._report("the process of the trackers has ended: see trackers/trackers.log")

    def _report(self, text: str) -> None:
        with contextlib.suppress(LinkError):  # the run is ending, which the main thread handles
            self._notify(self._step, text)


def environment() -> dict[str, str]:
    """Returns the trackers' environment: not of a rank or an MPI process, and without a GPU."""
    kept = {k: v for k, v in clean_environment().items() if not k.startswith(LEFT_OUT)}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"} | LOG_ENCODING


def shown_config(config: RunConfig) -> dict[str, Any]:
    """Returns the flat configuration for trackers and TensorBoard event files.

    It leaves out `notify`, because its command may hold a password, and everything after a `?` in a
    URL.
    """
    tree = to_tree(config)
    del tree["notify"]
    return {key: _shown(value) for key, value in flatten(tree).items()}


def _shown(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value.partition("?")[0] if "://" in value else value
    if isinstance(value, list):
        return str([_shown(item) for item in value])
    if isinstance(value, dict):
        return str({key: _shown(item) for key, item in value.items()})
    return str(value)
