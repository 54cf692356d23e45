"""An engine in the background is independent of the terminal that it was started from."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.e2e.lab import processes
from tests.waiting import until


@pytest.fixture(scope="module")
def orphan(either_lab):
    """A detached run, held in step 2, whose shell and terminal have been closed."""
    lab = either_lab
    run = lab.run("from-a-terminal")
    run.hold(2)
    master, slave = os.openpty()
    run.terminal = os.ttyname(slave)
    started = run.gate / "shell-is-done"
    command = shlex.join([str(lab.program), *run.arguments, "--detach"])
    # The terminal that a session leader opens becomes its controlling terminal.
    script = f"exec <{run.terminal} >{run.terminal} 2>&1; {command} && touch {started}; sleep 600"
    environment = lab.environment | {"TERM": "xterm"}
    shell = subprocess.Popen(
        ["sh", "-c", script],
        env=environment,
        start_new_session=True,
        # The tests may run with SIGHUP ignored (nohup); this shell must not ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    )
    until(started.exists, "return of --detach")
    run.shell_session = os.getsid(shell.pid)
    os.killpg(shell.pid, signal.SIGHUP)
    os.close(slave)
    os.close(master)
    shell.wait(timeout=240)
    run.wait_at(2)
    yield run
    run.end()


def open_files(process):
    """The open files of a process, by the kernel's names."""
    found = []
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return found


def test_the_engine_and_its_rank_are_in_sessions_of_their_own(orphan):
    sessions = {os.getsid(p.pid) for p in (orphan.engine(), orphan.rank())}
    assert len(sessions) == 2
    assert orphan.shell_session not in sessions


def test_it_is_steered_from_another_process(orphan):
    # 4 is the current value, so the command changes only the command log.
    assert orphan.ctl("set", "save_every=4", "--id", "from-outside").returncode == 0
    assert orphan.commands()["from-outside"]["status"] == "accepted"


def test_no_file_of_the_caller_is_kept_open(orphan):
    for process in (orphan.engine(), orphan.rank()):
        names = open_files(process)
        assert orphan.terminal not in names
        outputs = {os.readlink(f"/proc/{process.pid}/fd/{n}") for n in (1, 2)}  # noqa: PTH115
        assert outputs == {str(orphan.session.log_file)}


def test_a_callers_pipe_ends_when_detach_returns(endless):
    # Its output was captured through a pipe, which ends only when every copy is closed.
    names = open_files(endless.engine())
    ours = {str(os.readlink(f"/proc/self/fd/{n}")) for n in (0, 1, 2)}  # noqa: PTH115
    assert not [n for n in names if n.startswith("pipe:") and n in ours]


def test_every_process_of_a_session_shows_its_folder(orphan):
    shown = {p.pid for p in processes(orphan.session.folder)}
    engine = orphan.engine()
    family = {engine.pid, *(p.pid for p in engine.children(recursive=True))}
    assert family == shown
    assert len(family) >= 2


def test_a_rank_ignores_the_signals_of_a_scheduler(orphan):
    rank = orphan.rank()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        rank.send_signal(number)
    # Signals are delivered in order: if one had ended the rank, the run would not finish.
    orphan.release(2)
    orphan.finish()
    assert rank.pid not in psutil.pids()
    with orphan.reader() as reader:
        assert len(reader.attempts()) == 1


def test_it_finishes_without_its_terminal(orphan, undisturbed):
    orphan.release(2)
    orphan.finish()
    assert orphan.numbers() == undisturbed.numbers()


def test_the_session_is_accessible_to_its_owner_only(endless):
    folder = endless.session.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "engine.sock").stat().st_mode & 0o777 == 0o600
