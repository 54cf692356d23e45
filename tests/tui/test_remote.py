"""A session of another machine: its address, the copy of its tail, and the forwarded socket."""

import contextlib
import os
import re
import sqlite3
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from benchmarks.terminal import Engine as StandInEngine
from engine import starter
from engine.config import file as config_file
from engine.errors import LinkError, NoSuchSessionError, UserInputError
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.journal.writer import JournalWriter
from engine.metrics import EVAL_SCORE
from engine.protocol.client import Client
from engine.protocol.rank_messages import StepReport
from engine.session.folder import SessionFolder, create
from engine.session.lock import is_held
from engine.session.temporary_folders import LOCK_NAME
from rlhf_tui.commands.reading import sessions
from rlhf_tui.remote import ssh as remote_ssh
from rlhf_tui.remote.copy import SessionCopy
from rlhf_tui.remote.messages import decode, encode
from rlhf_tui.remote.source import LOG_BYTES, SessionSource
from rlhf_tui.remote.ssh import PROGRAM_VARIABLE, Address, RemoteSession
from rlhf_tui.widgets.key_footer import KeyFooter
from rlhf_tui.widgets.status_lines import StatusLine
from tests import waiting
from tests.tui.screen import notices

SCORE = "objective/scores"

# Runs the command on this machine; with -L it forwards a Unix socket, as OpenSSH does.
SSH = r"""#!{python}
import os, re, socket, subprocess, sys, threading
arguments = sys.argv[1:]
if "-L" in arguments:
    given = arguments[arguments.index("-L") + 1]
    local, remote = (
        os.path.expandvars(re.sub(r"[\\](.)", r"\1", part).replace("%%", "%"))
        for part in re.split(r"(?<![\\]):", given)
    )
    server = socket.socket(socket.AF_UNIX)
    server.bind(local)
    server.listen()
    def pump(source, target):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    def forward():
        while True:
            near, _ = server.accept()
            far = socket.socket(socket.AF_UNIX)
            far.connect(remote)
            for pair in ((near, far), (far, near)):
                threading.Thread(target=pump, args=pair, daemon=True).start()
    threading.Thread(target=forward, daemon=True).start()
host = arguments[arguments.index("--") - 1]
if host == "nowhere":
    sys.exit("ssh: Could not resolve hostname nowhere")
sys.exit(subprocess.run(["sh", "-c", arguments[-1]]).returncode)
"""


# Sends the session once and then something else; the file has the process id of its ssh.
GARBLED = """#!{python}
import os, subprocess, sys, time
command = [sys.executable, "-m", "rlhf_tui.cli", *sys.argv[1:]]
mirror = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
for line in mirror.stdout:
    print(line, end="", flush=True)
    if '"done"' in line:
        break
mirror.kill()
ssh = os.getppid()
with open("{pid}", "w") as file:
    print(ssh, file=file)
print("Connection to box is slow", flush=True)
while os.getppid() == ssh:
    time.sleep(0.05)
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """A stand-in for ssh whose other machine is this one."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(PROGRAM_VARIABLE, f"{sys.executable} -m rlhf_tui.cli")


def seen(session):
    """What readers give of a session."""
    with JournalReader(session) as reader:
        return {
            "meta": reader.meta(),
            "series": reader.metrics.series(SCORE, after=195),
            "events": reader.events(),
            "commands": reader.commands(),
            "checkpoints": reader.checkpoints(),
            "samples": reader.samples.page(SampleQuery(), 50),
        }


# -- addresses -------------------------------------------------------------------------------------


def test_an_address_has_host_port_and_session():
    assert Address.parse("ssh://ana@box:2222/run-1") == Address("ana@box", "2222", "run-1")
    assert Address.parse("ssh://box") == Address("box")
    command = Address.parse("ssh://box:22/x").command("status", "a b")
    assert command == ["ssh", "-p", "22", "-T", "box", "--", "rlhf-tui status 'a b'"]


@pytest.mark.parametrize("text", ["ssh://", "ssh:///run", "ssh://-oProxyCommand=x/run", "http://x"])
def test_what_is_no_address_is_refused(text):
    form = re.escape("is not an address: use ssh://[USER@]HOST[:PORT][/NAME]")  # ls takes no NAME
    with pytest.raises(UserInputError, match=form):
        Address.parse(text)


# -- the copy --------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    """Keeps a copy of a session."""
    copies = []

    def make(session, tail=5000):
        source = SessionSource(session, tail)
        copy = SessionCopy(tmp_path, tmp_path / "s")
        copies.append(copy)
        copy.take(decode(encode(source.hello())))

        def update():
            for message in source.changes():
                copy.take(decode(encode(message)))

        update()
        return copy.session, update

    yield make
    for copy in copies:
        copy.close()


def test_a_copy_reads_as_the_session_does(root, copied):
    copy, _ = copied(SessionFolder(root / "frozen"))
    assert copy.folder.parent != root
    assert seen(copy) == seen(SessionFolder(root / "frozen"))
    assert copy.config() == SessionFolder(root / "frozen").config()
    assert "ERROR something failed" in copy.log_file.read_text()


def test_of_a_long_run_the_tail_is_copied(root, copied):
    copy, _ = copied(SessionFolder(root / "frozen"), tail=50)
    with JournalReader(copy) as reader:
        assert [step for step, _ in reader.metrics.series(SCORE)] == list(range(151, 201))
        assert reader.last_step() == 200


def test_a_copy_follows_new_steps_and_roll_backs(session_maker, tmp_path, copied):
    session = session_maker(tmp_path / "made", "run", 20)
    copy, update = copied(session)
    journal = JournalWriter(session)
    journal.begin_attempt(10, fresh=True)
    update()
    with JournalReader(copy) as reader:
        assert reader.last_step() == 10
        assert len(reader.metrics.past_series(SCORE)) == 10
    report = StepReport(step=11, metrics={SCORE: 5.0}, samples=[], settings={"beta": 0.05})
    journal.record_step(report)
    update()
    assert seen(copy) == seen(session)
    with JournalReader(copy) as reader:
        assert reader.metrics.series(SCORE, after=10) == [(11, 5.0)]
    journal.close()


def test_of_a_run_without_a_step_the_evaluation_before_it_is_copied(tmp_path, copied):
    config = config_file.load(starter.FOLDER / "demo.yaml")
    session = create(tmp_path / "sessions", "new", config)
    copy, update = copied(session)  # its engine has written nothing yet
    assert copy.config() == config
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    journal.record_evaluation(0, {EVAL_SCORE: 0.5}, [])
    update()
    with JournalReader(copy) as reader:
        assert reader.metrics.series(EVAL_SCORE) == [(0, 0.5)]
    journal.close()


def test_a_log_that_grows_by_more_than_is_sent_at_once_is_copied_whole(tmp_path, copied):
    session = create(tmp_path / "sessions", "new", config_file.load(starter.FOLDER / "demo.yaml"))
    session.log_file.write_text("begin\n")
    copy, update = copied(session)
    with session.log_file.open("a") as file:
        file.write("x" * 2 * LOG_BYTES + "\nend\n")
    update()
    assert copy.log_file.read_text() == session.log_file.read_text()


def test_a_viewer_that_stalls_keeps_no_snapshot_of_the_journal_open(session_maker, tmp_path):
    session = session_maker(tmp_path / "made", "run", 20)
    journal = JournalWriter(session)
    journal.begin_attempt(20, fresh=False)
    changes = SessionSource(session, 100).changes()
    next(changes)  # the connection takes no more
    with contextlib.closing(sqlite3.connect(session.journal_file, timeout=0)) as database:
        busy, *_ = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert not busy
    journal.close()


def test_what_is_no_message_is_an_error_of_one_line():
    with pytest.raises(LinkError, match="'Welcome to box!'"):
        decode(b"Welcome to box!\n")


# -- over ssh --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "name"), [("there", "run"), ("50% a:b\\c", "s")])
def test_a_live_session_is_followed_and_steered_over_ssh(
    session_maker, tmp_path, ssh, folder, name
):
    session = session_maker(tmp_path / folder, name, 5)
    engine = StandInEngine(session)
    arguments = ["mirror", name, "--sessions", str(tmp_path / folder)]
    with RemoteSession(Address("box", name=name), arguments) as remote:
        copy = SessionFolder(remote.root / remote.name)
        assert copy.is_live()
        assert is_held(remote.root / LOCK_NAME)  # by which what a killed process leaves is removed
        assert seen(copy)["events"] == seen(session)["events"]

        def answers():
            try:
                with Client(copy, "ana") as client:
                    return client.status().pid == os.getpid()
            except LinkError:
                return False  # ssh has not bound the socket yet

        waiting.until(answers, "the forwarded socket")
    assert not Path(remote.root).exists()
    engine.server.close()
    engine.lock.release()


def test_the_other_machine_cannot_read_variables_of_this_one(session_maker, tmp_path, ssh):
    """ssh would put their values into the path that it asks the other machine to connect to.

    The session can be read.
    """
    session = session_maker(tmp_path / "${HOME}", "run", 5)
    engine = StandInEngine(session)
    arguments = ["mirror", "run", "--sessions", str(session.folder.parent)]
    with RemoteSession(Address("box", name="run"), arguments) as remote:
        assert remote.stale.endswith("which ssh cannot forward")
        copy = SessionFolder(remote.root / "run")
        with JournalReader(copy) as reader:
            assert reader.last_step() == 5
        with pytest.raises(LinkError, match="does not reply"):
            Client(copy, "me")
    engine.server.close()
    engine.lock.release()


def test_a_connection_whose_messages_cannot_be_used_is_ended(
    session_maker, tmp_path, ssh, monkeypatch
):
    monkeypatch.setattr(remote_ssh, "RECONNECT_INTERVAL", 2 * waiting.LONG)
    session_maker(tmp_path / "there", "run", 5)
    pid = tmp_path / "pid"
    program = tmp_path / "program"
    program.write_text(GARBLED.format(python=sys.executable, pid=pid))
    program.chmod(0o755)
    monkeypatch.setenv(PROGRAM_VARIABLE, f"exec {program}")
    arguments = ["mirror", "run", "--sessions", str(tmp_path / "there")]
    with RemoteSession(Address("box", name="run"), arguments) as remote:
        waiting.until(lambda: pid.exists() and pid.read_text(), "the other machine's program")
        waiting.until(lambda: not waiting.is_running(int(pid.read_text())), "the end of ssh")
        waiting.until(lambda: remote.stale, "the reason")
        assert "connecting again: the other machine did not send a session" in remote.stale

    def has_ended():  # `close` waits for the thread, but not for ever
        return "remote session" not in [thread.name for thread in threading.enumerate()]

    waiting.until(has_ended, "the end of the thread")


def test_a_copy_that_cannot_be_written_any_more_says_so_until_it_can(
    session_maker, tmp_path, ssh, monkeypatch
):
    monkeypatch.setattr(remote_ssh, "RECONNECT_INTERVAL", 0.1)
    session = session_maker(tmp_path / "there", "run", 5)
    arguments = ["mirror", "run", "--sessions", str(tmp_path / "there")]
    with RemoteSession(Address("box", name="run"), arguments) as remote:
        assert not remote.stale
        copy = SessionFolder(remote.root / remote.name)
        copy.lock_file.mkdir()
        engine = StandInEngine(session)
        waiting.until(lambda: remote.stale, "the reason")
        assert remote.stale.endswith(
            f"connecting again: cannot lock {copy.lock_file}: Is a directory"
        )
        copy.lock_file.rmdir()
        waiting.until(lambda: not remote.stale, "the next connection")
        assert copy.is_live()
    engine.server.close()
    engine.lock.release()


def test_silence_of_the_other_machine_is_reported_but_not_a_clock_that_is_set(
    session_maker, tmp_path, ssh, monkeypatch
):
    session_maker(tmp_path / "there", "run", 5)
    arguments = ["mirror", "run", "--sessions", str(tmp_path / "there")]
    with RemoteSession(Address("box", name="run"), arguments) as remote:
        clock = time.time
        monkeypatch.setattr(time, "time", lambda: clock() + 3600)
        assert not remote.stale
        monkeypatch.setattr(remote_ssh, "SILENCE_TIMEOUT", -1.0)
        assert "box has sent nothing since" in remote.stale


async def test_the_app_says_that_the_copy_is_stale(run_app, until):
    origin = SimpleNamespace(address="ssh://box/frozen", stale="")
    async with run_app(origin=origin) as (app, pilot):
        status = app.screen.query_one(StatusLine)
        origin.stale = "not updated since 14:03, connecting again: box: \x1b[31mConnection refused"
        await until(pilot, lambda: "not updated since 14:03" in status.text())
        assert "\x1b" not in status.text()
        origin.stale = ""
        await until(pilot, lambda: "not updated" not in status.text())


async def test_a_key_that_is_off_on_a_copy_does_not_say_that_the_app_is_read_only(run_app, until):
    origin = SimpleNamespace(address="ssh://box/frozen", stale="")
    async with run_app(origin=origin) as (app, pilot):
        assert app.screen.query_one(KeyFooter).text().endswith("ssh://box/frozen  ? help")
        await pilot.press("4", "r")
        await until(pilot, lambda: notices(app))
        assert notices(app) == ["a copy over ssh: checkpoints can only be listed"]


def test_a_machine_without_ssh_is_reported_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LinkError, match="cannot run ssh: No such file"):
        RemoteSession(Address("box", name="run"), ["mirror", "run"]).__enter__()


def test_what_goes_wrong_over_ssh_is_an_error_of_one_line(tmp_path, ssh):
    with pytest.raises(LinkError, match="nowhere: ssh: Could not resolve"):
        RemoteSession(Address("nowhere", name="run"), ["mirror", "run"]).__enter__()
    arguments = ["mirror", "run", "--sessions", str(tmp_path)]
    with pytest.raises(NoSuchSessionError, match="box: no session 'run'"):
        RemoteSession(Address("box", name="run"), arguments).__enter__()


def test_sessions_of_another_machine_are_listed(root, ssh):
    given = ["ssh://box", "--sessions", str(root)]
    result = CliRunner().invoke(sessions.ls, given, standalone_mode=False)
    assert result.exception is None
    assert result.stdout.splitlines()[1].split()[:3] == ["frozen", "finished", "200/200"]
