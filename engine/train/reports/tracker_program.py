"""Passes metrics on to experiment trackers: ``python -m engine.train.reports.tracker_program``.

It is a separate process, so that a tracker that fails, hangs or ends its process does not affect
the run. It reads a :class:`Header` and then one :class:`Line` after another as JSON from standard
input, and ends when the input does. It writes each problem as a line of text to standard output;
the output of trackers goes to standard error. It runs in the session's folder `trackers/`, so that
trackers write their files there.
"""

import contextlib
import json
import math
import os
import queue
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from accelerate import PartialState
from accelerate.tracking import GeneralTracker

from engine.errors import SessionLockedError, first_line
from engine.examined import examined
from engine.session.access import read_bytes
from engine.session.folder import write_atomically
from engine.session.lock import SessionLock
from engine.train.reports.tracker_kinds import Header, make_tracker

FINISH_SECONDS = 60
"""Seconds in which trackers can send pending metrics after the end of the run."""
HELD_SECONDS = 3
"""Further seconds until the process ends, even if a package's native code blocks all threads."""
IDS_FILE = "runs.json"
"""Name of the file: tracker → id of this session's run."""
FOLDER = "folder"
"""The key in it whose value is no id, but the folder in which it was written."""
LOCK_FILE = ".lock"
MAX_LOG = 10_000_000
"""Bytes of the trackers' output that are kept: the first half, and the newest of the rest."""
LOG_INTERVAL = 1.0
"""Seconds between two checks of the log's size."""
MAX_PENDING = 10_000
"""Number of steps that wait for a tracker at most; further ones are dropped."""
FAILURES = (Exception, SystemExit)
"""Failures of any package. Some call `sys.exit`, which would end the other trackers, too."""

Report = Callable[[str], None]


class Line(msgspec.Struct, frozen=True):
    """The metrics of a step."""

    step: int
    metrics: dict[str, float | None]
    """Value by name; None if it is not finite."""


def main() -> None:
    """Runs until standard input ends."""
    # Text that a tracker's package prints must not be read as a problem.
    problems = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it ends when the input does
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    reporting = threading.Lock()

    def report(text: str) -> None:
        with reporting:
            problems.write(" ".join(text.split()) + "\n")
            problems.flush()

    threading.Thread(target=keep_log_short, daemon=True, name="log").start()
    os.umask(0o077)  # only the owner may read the trackers' files
    header = msgspec.json.decode(sys.stdin.buffer.readline(), type=examined(Header))
    PartialState(cpu=True)  # the logger of accelerate's trackers needs it
    lock = wait_for_lock()
    ids = RunIds(Path(IDS_FILE))
    runs = [TrackerRun(name, header, ids, report) for name in header.trackers]
    threading.Thread(target=pass_on, args=(runs, report), daemon=True, name="input").start()
    others = [threading.Thread(target=run, name=run.name) for run in runs[1:]]
    for thread in others:
        thread.start()
    runs[0]()  # some packages set signal handlers, which only the main thread can
    for thread in others:
        thread.join()
    lock.release()
    sys.stderr.flush()
    shorten_log()
    os._exit(0)  # threads of a package may prevent the interpreter from ending


def pass_on(runs: "list[TrackerRun]", report: Report) -> None:
    """Passes the metrics from standard input to each tracker; at its end, waits up to a minute.

    Ends the process if a tracker needs longer.
    """
    for data in sys.stdin.buffer:
        line = msgspec.json.decode(data, type=examined(Line))
        values = {k: math.nan if v is None else v for k, v in line.metrics.items()}
        for run in runs:
            run.log(values, line.step)
    signal.alarm(FINISH_SECONDS + HELD_SECONDS)
    end = time.monotonic() + FINISH_SECONDS
    for run in runs:
        run.close()
    if late := [run for run in runs if not run.ended.wait(max(0.0, end - time.monotonic()))]:
        for run in late:
            report(f"{run.name} did not finish in time: the last steps may be missing there")
        os._exit(0)


def keep_log_short() -> None:
    """Shortens the log whenever it is too long, even while a call of a tracker does not return."""
    while True:
        time.sleep(LOG_INTERVAL)
        shorten_log()


def shorten_log() -> None:
    """Cuts the log file on standard error if it is longer than :data:`MAX_LOG`."""
    with contextlib.suppress(OSError):  # a tracker must work without a log, such as on a full disk
        status = os.fstat(2)
        if stat.S_ISREG(status.st_mode) and status.st_size > MAX_LOG:
            os.ftruncate(2, MAX_LOG // 2)
            os.write(2, b"\n... left out: trackers print too much ...\n")


def wait_for_lock() -> SessionLock:
    """Waits until the process of an earlier attempt no longer uses the same runs.

    Raises:
        SessionLockedError: it still does, long after it should have ended.
    """
    last = time.monotonic() + FINISH_SECONDS + 5
    while True:
        try:
            return SessionLock(Path(LOCK_FILE))
        except SessionLockedError:
            if time.monotonic() > last:
                raise
            time.sleep(0.2)


class RunIds:
    """A file with the ids of the session's runs, and the folder in which it was written.

    The latter tells a session that was moved from a copy, whose original still has the runs.
    """

    def __init__(self, file: Path) -> None:
        """Reads the file. In a copy of a session there are no ids yet."""
        self._file = file
        self._lock = threading.Lock()
        self._ids: dict[str, str] = json.loads(read_bytes(file)) if file.exists() else {}
        here = str(file.parent.resolve())
        if self._ids.get(FOLDER, here) != here:
            if self._is_copy(Path(self._ids[FOLDER], file.name)):
                self._ids = {}
            self.add(FOLDER, here)
        self._ids[FOLDER] = here

    def _is_copy(self, original: Path) -> bool:
        """Whether another file has one of these runs."""
        try:
            if original.samefile(self._file):  # a folder that has two paths
                return False
            ids = json.loads(read_bytes(original))
        except (OSError, ValueError):
            return False
        mine = self._ids.items()
        shared = [item for item in ids.items() if item in mine] if isinstance(ids, dict) else []
        return any(key != FOLDER for key, _ in shared)

    def get(self, tracker: str) -> str:
        """Returns the id of a tracker's run; "" if it has none yet."""
        return self._ids.get(tracker, "")

    def add(self, tracker: str, run_id: str) -> None:
        """Adds an id and writes the file."""
        with self._lock:
            self._ids[tracker] = run_id
            write_atomically(self._file, json.dumps(self._ids, indent=1))


class TrackerRun:
    """A tracker in its own thread. Its first failure is reported; if it hangs, the others do not.

    All calls of its package come from the same thread, because MLflow has one run per thread.
    """

    def __init__(self, name: str, header: Header, ids: RunIds, report: Report) -> None:
        self.name = name
        self._header = header
        self._ids = ids
        self._report = report
        self._reported = False
        self._dropped = False
        self._pending: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue()
        self.ended = threading.Event()
        """Set once nothing more is passed on to the tracker."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Passes the metrics of a step on; returns at once."""
        if self._pending.qsize() < MAX_PENDING:
            self._pending.put((values, step))
        elif not self._dropped:
            self._dropped = True
            self._report(
                f"{self.name} is {MAX_PENDING} steps behind: it misses steps from {step} on"
            )

    def close(self) -> None:
        """Lets the tracker end once it has everything that was passed on."""
        self._pending.put(None)

    def __call__(self) -> None:
        """Runs the tracker to its end.

        Continues the run of the session's earlier attempts, if there is one.
        """
        try:
            self._run()
        finally:
            self.ended.set()

    def _run(self) -> None:
        try:
            tracker = self._start()
        except FAILURES as error:
            self._report(f"{self.name} cannot be started: {first_line(error)}")
            self._dropped = True  # nothing reads the queue any more
            return
        while (line := self._pending.get()) is not None:
            values, step = line
            try:
                tracker.log(values, step=step)
            except FAILURES as error:
                self._failed(f"the metrics of step {step}", error)
        try:
            tracker.finish()
        except FAILURES as error:
            self._failed("the end of the run", error)

    def _start(self) -> GeneralTracker:
        tracker, run_id = make_tracker(self.name, self._header, self._ids.get(self.name))
        tracker.start()
        if not self._ids.get(self.name):
            self._ids.add(self.name, run_id())
            tracker.store_init_configuration(self._header.config)
        return tracker

    def _failed(self, what: str, error: BaseException) -> None:
        if not self._reported:
            self._reported = True
            self._report(f"{self.name} did not take {what}: {first_line(error)}")


if __name__ == "__main__":
    main()
