"""Faults outside the engine: full disks, limits, rewards, services, stops, memory, clocks."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.faults.kills import undisturbed_run
from tests.faults.lab import WAIT, FaultRun, LostError
from tests.faults.table import Table
from tests.reward_service import RewardService, reply
from tests.waiting import until

STEPS = 24
REWARD_FAULTS = (
    "raise",
    "hang",
    "exit",
    "sysexit",
    "fork",
    "none",
    "nan",
    "huge",
    "short",
    "words",
)
QUICK = (
    "reward.retries=0", "launch.silence=30", "guardrails.silent_rank=10", "log.tensorboard=true",
)  # fmt: skip


class OutsideFaults:
    """Each method does one kind of fault to a run, which must end like the undisturbed one."""

    def __init__(self, root: Path, table: Table, only: str = "") -> None:
        """`only`: a part of the names of the faults that are done."""
        self._root, self._table, self._only = root, table, only
        self._whole = undisturbed_run(root, STEPS, *QUICK)

    def all(self) -> None:
        """Every class, one after the other."""
        for fault in REWARD_FAULTS:
            self._try("reward", fault, lambda run, f=fault: reward(run, f))
        self._try("full disk", "journal", full_journal)
        self._try("full disk", "checkpoint", full_checkpoint)
        self._try("full disk", "journal while paused, save under way", full_while_paused)
        if os.geteuid() == 0:
            self._try("full disk", "a file system of 3 MB", full_file_system, mounted="3m")
            self._try("read-only session", "at a resume", read_only, mounted="20m")
        self._try("limit", "RLIMIT_NOFILE of the supervisor", few_files_supervisor)
        self._try("limit", "RLIMIT_NOFILE of the rank", few_files_rank)
        self._try("limit", "RLIMIT_NPROC of the rank", few_processes)
        self._try("limit", "RLIMIT_AS of the rank", little_memory)
        self._try("allocation failure", "in a step", lambda run: at_point(run, *STEP_MEMORY))
        self._try("allocation failure", "in a save", lambda run: at_point(run, *SAVE_MEMORY))
        self._try("allocation failure", "supervisor", lambda run: at_point(run, *JOURNAL_MEMORY))
        self._try("SIGSTOP", "rank, longer than launch.silence", stopped_rank)
        self._try("SIGSTOP", "supervisor, longer than launch.silence", stopped_supervisor)
        for hours in (-1, 24, -48):
            self._try("clock", f"{hours:+d} h", lambda run, h=hours: clock(run, h))
        self._services()

    def _try(
        self, kind: str, fault: str, act: Callable[[FaultRun], None], mounted: str = ""
    ) -> None:
        if self._only not in f"{kind}: {fault}":
            return
        number = sum(row["tried"] for row in self._table.rows.values())
        name = f"outside-{number}"
        place = self._root / f"place-{number}"
        with file_system(place, mounted) if mounted else contextlib.nullcontext():
            one = ("train.keep_last=1", "train.keep_best=0", "train.keep_before_alert=false")
            keep = one if mounted else ()
            run = FaultRun(place if mounted else self._root, name, *QUICK, *keep, steps=STEPS)

            def check() -> None:
                act(run)
                finish(run)
                run.check(self._whole)

            try:
                self._table.count(f"{kind}: {fault}", fault, check)
            finally:
                run.end()

    def _services(self) -> None:
        """A reward service that refuses, stalls or answers garbage; the run waits and resumes."""

        def stall(handler: object, _request: object) -> None:
            time.sleep(60)

        known = [
            ("refuse", None),
            ("garbage", reply(b"\xff\xfe not json")),
            ("too few scores", reply({"scores": []})),
            ("status 500", reply({"error": "\x1b[31m"}, 500)),
            ("stall", stall),
        ]
        faults = [(n, b) for n, b in known if self._only in f"reward service: {n}"]
        if not faults:
            return
        service = RewardService()
        keys = (f"reward={{service: '{service.url}', http: {{timeout: 5}}}}", "reward.path=null")
        whole = undisturbed_run(self._root, STEPS, *QUICK, *keys, name="undisturbed-service")
        for name, behaviour in faults:
            run = FaultRun(
                self._root, f"service-{name.replace(' ', '-')}", *QUICK, *keys, steps=STEPS
            )

            def check(run: FaultRun = run, behaviour: object = behaviour) -> None:
                run.start()
                run.wait_for_step(4)
                good = service.behaviour
                if behaviour is None:
                    service.stop()
                else:
                    service.behaviour = behaviour  # type: ignore[assignment]  # one of ours
                state = run.wait_for("paused", "failed")
                if behaviour is None:
                    service.start()
                service.behaviour = good
                if state == "failed":
                    raise LostError(f"the run failed: {run.log()[-500:]}")
                finish(run)
                run.check(whole)

            try:
                self._table.count(f"reward service: {name}", name, check)
            finally:
                run.end()
        service.stop()


def finish(run: FaultRun) -> None:
    """Brings a run to its end, through a resume if it has ended before."""
    for _ in range(3):
        state = run.wait_for("finished", "failed", "stopped", "crashed", "paused")
        if state == "paused":
            run.send_unpause()
            until(lambda: run.state() != "paused", "a run that is not paused", WAIT)
            continue
        until(run.is_over, "the end of every process", WAIT)
        if state == "finished":
            return
        run.start()
        until(lambda: run.session.is_live() or run.is_over(), "an engine", WAIT)
    raise LostError(f"no regular end: {run.log()[-500:]}")


@contextlib.contextmanager
def file_system(place: Path, size: str) -> Iterator[None]:
    """A small file system at a folder."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


# -- rewards ---------------------------------------------------------------------------------------


def reward(run: FaultRun, what: str) -> None:
    """The reward misbehaves at a step; the run pauses, restarts its rank or ends with a reason."""
    run.fault(f"{what} 5")
    run.start()
    if what in ("exit", "fork"):
        run.wait_for_step(7)
    elif what == "hang":
        run.wait_for_step(4)
        until(lambda: "silent for" in alerts(run), "an alert of silence", WAIT)
    else:
        state = run.wait_for("paused", "failed")
        until(lambda: run.state() == "paused" or run.is_over(), state, WAIT)
        if "\x1b" in alerts(run):
            raise LostError("an alert has control characters")
    run.fault("")


def alerts(run: FaultRun) -> str:
    """The texts that the command line shows of a run."""
    done = run.cli("events", run.session.name)
    if "Traceback" in done.stderr:
        raise LostError(done.stderr)
    return done.stdout


# -- disks and limits ------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(process: psutil.Process | None, limit: int, soft: int) -> Iterator[None]:
    """A soft limit of a running process."""
    if process is None:
        raise LostError("there is no such process")
    before = process.rlimit(limit)
    process.rlimit(limit, (soft, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error):
            process.rlimit(limit, before)


def full_journal(run: FaultRun) -> None:
    """No file of the supervisor can grow for a while."""
    run.start()
    run.wait_for_step(4)
    with limited(run.engine(), psutil.RLIMIT_FSIZE, 0):
        until(lambda: run.waits_for_room() or run.is_over(), "a full disk", WAIT)
        time.sleep(3)
    if run.is_over():
        raise LostError(f"the run ended: {run.log()[-500:]}")


def full_checkpoint(run: FaultRun) -> None:
    """No file of the rank can grow while it saves; the next save works."""
    run.start()
    run.wait_for_step(4)
    with limited(run.ranks()[0], psutil.RLIMIT_FSIZE, 0):
        until(
            lambda: "cannot write the checkpoint" in alerts(run) or run.is_over(), "a notice", WAIT
        )


def full_while_paused(run: FaultRun) -> None:
    """The journal cannot be written from a pause to the end of a save that began before it."""
    run.start({"RLHF_TUI_TEST_POINT": ""})
    run.wait_for_step(5)
    run.send_pause()
    run.wait_for("paused")
    with limited(run.engine(), psutil.RLIMIT_FSIZE, 0):
        run.send_unpause()
        time.sleep(6)
    if run.is_over():
        raise LostError(f"the run ended: {run.log()[-500:]}")


def full_file_system(run: FaultRun) -> None:
    """The file system is full for a while, at the moment of a step or of a save."""
    run.start()
    run.wait_for_step(5)
    filler = run.session.folder.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    until(lambda: run.waits_for_room() or run.is_over(), "a full disk", WAIT)
    time.sleep(5)
    filler.unlink()
    if run.is_over():
        raise LostError(f"the run ended: {run.log()[-500:]}")


def read_only(run: FaultRun) -> None:
    """A resume in a read-only folder says so, and changes nothing; reading works."""
    run.start()
    run.wait_for_step(5)
    run.kill_engine()
    place = run.session.folder.parent.parent
    until(lambda: remount(place, "ro"), "a read-only file system", WAIT)
    try:
        for words in (("status",), ("metrics",), ("verify",)):
            done = run.cli(*words, run.session.name)
            if done.returncode or "Traceback" in done.stderr:
                raise LostError(f"{words}: {done.stdout} {done.stderr}")
        done = run.cli("resume", run.session.name, "--detach")
        if done.returncode != 1 or done.stderr.count("\n") != 1:
            raise LostError(f"resume: {done.returncode} {done.stderr}")
    finally:
        remount(place, "rw")
    run.start()


def remount(place: Path, how: str) -> bool:
    """Mounts a file system again, read-only or not; false while a killed thread has a file open."""
    done = subprocess.run(
        ["mount", "-o", f"remount,{how}", place], capture_output=True, check=False
    )
    return done.returncode == 0


def few_files_supervisor(run: FaultRun) -> None:
    """The supervisor cannot open another file or accept another connection for a while.

    A save waits for that, as it syncs the samples.
    """
    run.start()
    run.wait_for_step(4)
    engine = run.engine()
    with limited(engine, psutil.RLIMIT_NOFILE, engine.num_fds() if engine else 0):
        for _ in range(3):
            run.send_note()
        until(
            lambda: "waiting for open files" in run.log() or run.step() >= 10 or run.is_over(),
            "a save or step 10", WAIT,
        )  # fmt: skip
    if run.is_over():
        raise LostError(f"the run ended: {run.log()[-500:]}")
    until(lambda: run.send_note() == "applied" or run.is_over(), "a reply", WAIT)


def few_files_rank(run: FaultRun) -> None:
    """The rank cannot open another file: it pauses for the reward, or cannot save."""
    run.start()
    run.wait_for_step(4)
    rank = run.ranks()[0]
    with limited(rank, psutil.RLIMIT_NOFILE, rank.num_fds()):
        until(lambda: "Too many open files" in alerts(run) or run.is_over(), "a notice", WAIT)


def few_processes(run: FaultRun) -> None:
    """The rank can start no thread or process (root is exempt from this limit)."""
    run.start()
    run.wait_for_step(4)
    with limited(run.ranks()[0], psutil.RLIMIT_NPROC, 1):
        run.wait_for_step(12)


def little_memory(run: FaultRun) -> None:
    """The rank's address space cannot grow."""
    run.start()
    run.wait_for_step(4)
    rank = run.ranks()[0]
    with limited(rank, psutil.RLIMIT_AS, rank.memory_info().vms):
        run.wait_for_step(12)


# -- memory, stops, clocks -------------------------------------------------------------------------

STEP_MEMORY = ("engine.train.boundary:Boundary.after_step", "before", 5)
SAVE_MEMORY = ("engine.train.checkpoints.folder:sync_and_hash", "before", 9)
JOURNAL_MEMORY = ("engine.journal.writer:JournalWriter.record_step", "before", 5)


def at_point(run: FaultRun, place: str, when: str, count: int) -> None:
    """A MemoryError at a point."""
    marker = run.place / "marker"
    run.start({"RLHF_TUI_TEST_POINT": f"{place}|{when}|{count}|memory|{marker}"})
    until(marker.exists, "the point", WAIT)
    run.wait_for_step(12)


def stopped_rank(run: FaultRun) -> None:
    """The rank is taken for hung, killed and started again."""
    run.start()
    run.wait_for_step(4)
    rank = run.ranks()[0]
    rank.send_signal(signal.SIGSTOP)
    until(lambda: "silent for" in run.log() or not rank.is_running(), "the end of the rank", WAIT)


def stopped_supervisor(run: FaultRun) -> None:
    """Its own absence is no silence of the ranks."""
    run.start()
    run.wait_for_step(4)
    engine, ranks = run.engine(), [rank.pid for rank in run.ranks()]
    if engine is None:
        raise LostError("there is no engine")
    engine.send_signal(signal.SIGSTOP)
    time.sleep(35)
    engine.send_signal(signal.SIGCONT)
    time.sleep(6)
    now = [rank.pid for rank in run.ranks()]
    if now != ranks and not run.is_over():
        raise LostError("healthy ranks were killed")


def clock(run: FaultRun, hours: int) -> None:
    """The wall clock jumps between two commands, and the engine is killed."""
    offset = run.place / "offset"
    run.start({"RLHF_TUI_TEST_CLOCK": str(offset)})
    run.wait_for_step(4)
    run.send_target(3.0)
    offset.write_text(str(hours * 3600))
    run.send_target(4.0)
    run.wait_for_step(8)
    run.kill_engine()
    run.start({"RLHF_TUI_TEST_CLOCK": str(offset)})
    run.wait_for_step(10)
    if run.setting("target") != 4.0:
        raise LostError(f"target is {run.setting('target')} after a resume")
