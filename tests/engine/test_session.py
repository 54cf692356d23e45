"""Sessions: their names, owners, engines and states."""

import contextlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import starter
from engine.config import file as config_file
from engine.errors import (
    ConfigError,
    NoSuchSessionError,
    SessionError,
    SessionLockedError,
    SessionNameError,
)
from engine.journal.fork import copy_until
from engine.journal.judgements import labels
from engine.journal.notes import add_note
from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter
from engine.launch import start
from engine.launch.failed_start import remove_failed_start
from engine.launch.start import fork, resume
from engine.protocol.client import Client
from engine.session import folder as session_folder
from engine.session.checkpoints import sync
from engine.session.states import ENDED_STATES, LIVE_STATES
from engine.session.temporary_folders import LOCK_NAME, TemporaryFolder, written_whole

modest = settings(max_examples=200, deadline=None, derandomize=True)


@modest
@given(st.text(max_size=100))
def test_no_name_leads_out_of_the_sessions_folder(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp()
    try:
        session_folder.check_name(name)
    except SessionNameError:
        return
    assert (root / name).resolve().parent == root.resolve()
    assert name == name.strip()
    assert not name.startswith((".", "-"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a\n", "é", "-o", "x" * 81, "a\0"])
def test_a_name_that_cannot_be_one_is_refused_everywhere(tmp_path, name):
    config = config_file.load(starter.FOLDER / "demo.yaml")
    with pytest.raises(SessionNameError):
        session_folder.create(tmp_path, name, config)
    with pytest.raises(SessionNameError):
        session_folder.find(tmp_path, name)
    assert not list(tmp_path.iterdir())


@modest
@given(st.text(max_size=100))
def test_a_file_name_makes_a_name_that_can_be_one(tmp_path_factory, stem):
    root = tmp_path_factory.getbasetemp() / "none"
    session_folder.check_name(session_folder.free_name(root, stem))


def test_a_taken_name_is_refused_and_a_free_one_found(make_session):
    made = make_session("run")
    with pytest.raises(SessionNameError, match="resume"):
        make_session("run")
    assert session_folder.free_name(made.folder.parent, "run") == "run-2"
    assert made.config_file.is_file()


def test_a_session_is_its_owners_alone_and_states_everything(make_session):
    made = make_session("run", "seed=3")
    assert made.folder.stat().st_mode & 0o777 == 0o700
    assert made.config() == config_file.load(starter.FOLDER / "demo.yaml", ["seed=3"])


def test_a_session_that_began_before_a_key_existed_resumes_as_it_began(make_session):
    made = make_session("run")
    assert made.config().rollout.sampling == "gumbel"
    text = made.config_file.read_text()
    assert text.count("sampling: gumbel\n") == 1
    made.config_file.write_text(text.replace("  sampling: gumbel\n", ""))
    config = made.config()
    assert config.rollout.sampling == "inverse_cdf"
    made.write_config(config)  # as a resume does
    assert made.config() == config


def test_a_configuration_that_was_cut_off_after_any_line_is_noticed(make_session):
    made = make_session()
    lines = made.config_file.read_text().splitlines(keepends=True)
    for count in range(len(lines)):
        made.config_file.write_text("".join(lines[:count]))
        with pytest.raises(ConfigError, match="restore it from a copy"):
            made.config()


def test_nothing_is_left_of_a_configuration_that_could_not_be_written(make_session):
    made = make_session()
    leftover = made.folder / ".config.yaml.999999"  # of a process that was killed
    leftover.touch()
    made.config_file.unlink()
    made.config_file.mkdir()  # so that even root cannot replace it
    with pytest.raises(IsADirectoryError):
        made.write_config(config_file.load(starter.FOLDER / "demo.yaml"))
    assert not list(made.folder.glob(".config.yaml.*"))


def test_temporary_folders_of_killed_processes_are_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import tempfile, os; from engine.session.temporary_folders import TemporaryFolder\n"
        f"tempfile.tempdir = {str(tmp_path)!r}; folder = TemporaryFolder(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (abandoned,) = tmp_path.iterdir()
    alive = TemporaryFolder()
    for folder in (abandoned, alive.path):
        os.utime(folder / LOCK_NAME, (1, 1))  # long ago
    newest = TemporaryFolder()
    assert set(tmp_path.iterdir()) == {alive.path, newest.path}
    for folder in (alive, newest):
        folder.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_written_whole_is_not_there_after_a_kill(tmp_path):
    out = tmp_path / "model"
    code = (
        "import os; from pathlib import Path\n"
        "from engine.session.temporary_folders import written_whole\n"
        f"with written_whole(Path({str(out)!r})) as part:\n"
        "    (part / 'config.json').write_text('{}'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert not out.exists()
    os.utime(next(tmp_path.rglob(LOCK_NAME)), (1, 1))  # long ago
    with written_whole(out) as part:
        (part / "config.json").write_text("{}")
        os.utime(part / LOCK_NAME, (1, 1))
        with written_whole(tmp_path / "other"):
            assert not out.exists()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {"model", "model/config.json", "other"}


def test_a_file_system_that_cannot_sync_a_folder_fails_no_save():
    sync(Path("/proc/self"))  # of such a one
    with pytest.raises(FileNotFoundError):
        sync(Path("/proc/self/none"))


def test_no_umask_opens_a_session_or_its_folder_to_others(tmp_path):
    config = config_file.load(starter.FOLDER / "demo.yaml")
    umask = os.umask(0)
    try:
        made = session_folder.create(tmp_path / "deep" / "sessions", "run", config)
        made.write_engine("/a/socket", "1.0")
        JournalWriter(made).close()
        labels.set_label(made, "p", labels.Response(response="r", attempt=1, step=1, index=0),
                         "good", "me")  # fmt: skip
        held = made.acquire()
    finally:
        os.umask(umask)
    held.release()
    below = (tmp_path / "deep").rglob("*")
    modes = {p.relative_to(tmp_path): stat.S_IMODE(p.stat().st_mode) for p in below}
    assert {"journal.db", "samples.db", "labels.db", "engine.json", "engine.log", "engine.lock",
            "config.yaml", "checkpoints", "run", "sessions"} <= {p.name for p in modes}  # fmt: skip
    assert not {str(p): oct(m) for p, m in modes.items() if m & 0o077}
    assert stat.S_IMODE((tmp_path / "deep").stat().st_mode) == 0o700


@pytest.fixture
def planted(writer):
    """A session with a checkpoint, as another user sees it: everything can be read and written."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    writer.steps(1, 2)
    writer.checkpoint(2)
    folder = writer.session.folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)
    modes = {parent: stat.S_IMODE(parent.stat().st_mode) for parent in folder.parents}
    closed = {parent: mode for parent, mode in modes.items() if mode & 0o005 != 0o005}
    for parent, mode in closed.items():
        parent.chmod(mode | 0o055)
    yield writer.session
    for parent, mode in closed.items():
        parent.chmod(mode)


@pytest.fixture
def another_user(planted):
    """This process runs as somebody who does not own the session."""
    os.seteuid(65534)
    yield planted
    os.seteuid(0)


@pytest.mark.parametrize("owner", ["folder", "config", "link"])
def test_nothing_of_another_users_session_is_run(planted, owner, tmp_path):
    """Whoever may write in the sessions' folder could plant one, or exchange its configuration."""
    session = planted
    if owner == "link":
        session = session_folder.SessionFolder(session.folder.with_name("link"))
        session.folder.symlink_to(planted.folder)
    path = session.config_file if owner == "config" else session.folder
    os.chown(path, 65534, -1, follow_symlinks=False)
    given = {"reseed": False, "overrides": [], "who": "me"}
    for use in (
        session.acquire,
        lambda: resume(session, from_step=None, **given),
        lambda: fork(session, "child", from_step=2, **given),
    ):
        with pytest.raises(SessionError, match=f"'{session.name}' belongs to .* copy the folder"):
            use()
    with JournalReader(session_folder.find(session.folder.parent, session.name)) as reader:
        assert reader.last_step() == 2


def test_another_users_session_can_be_read_and_not_steered(another_user):
    with JournalReader(session_folder.find(another_user.folder.parent, "run")) as reader:
        assert reader.last_step() == 2
    with pytest.raises(SessionError, match="belongs to user root"):
        Client(another_user, "me")


def test_a_sessions_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    config = config_file.load(starter.FOLDER / "demo.yaml")
    with pytest.raises(SessionError, match="cannot create"):
        session_folder.create(tmp_path / "file", "run", config)


def test_a_folder_whose_path_is_no_utf8_is_refused_by_starts_and_resumes(make_session, tmp_path):
    root = tmp_path / os.fsdecode(b"\xff")
    session = make_session()
    with pytest.raises(SessionError, match="its path is not valid UTF-8; rename"):
        session_folder.create(root, "run", session.config())
    assert not root.exists()
    session.folder.parent.rename(root)
    with pytest.raises(SessionError, match="its path is not valid UTF-8"):
        resume(
            session_folder.SessionFolder(root / "run"),
            from_step=None,
            reseed=False,
            overrides=[],
            who="me",
        )


def test_the_longest_path_of_a_session_is_one_that_sqlite_takes(make_session, tmp_path):
    def of_length(length):
        root = tmp_path
        while (left := length - len(f"{root}/x/run")) > 200:
            root /= "d" * 200
        return root / ("é" * (left // 2) + "d" * (1 + left % 2))

    config, longest = make_session().config(), session_folder.LONGEST_PATH
    made = session_folder.create(of_length(longest), "run", config)
    assert len(os.fsencode(made.folder)) == longest
    JournalWriter(made).close()
    copy_until(made, session_folder.create(of_length(longest), "new", config), 0)
    with pytest.raises(SessionError, match=rf"'run' is too long for SQLite: {longest + 1} bytes"):
        session_folder.create(of_length(longest + 1), "run", config)
    assert not of_length(longest + 1).exists()


def test_a_session_is_held_by_one_engine_which_is_named(make_session):
    made = make_session()
    held = made.acquire()
    made.write_engine("/a/socket", "1.0")
    with pytest.raises(SessionLockedError, match=f"pid {made.engine().pid} on "):
        made.acquire()
    assert made.is_live()
    held.release()
    assert not made.is_live()


KILLED = """
import ctypes, os, sys, threading, time
from pathlib import Path
from engine.session.folder import SessionFolder

def write():  # as a thread that waits for the disk
    main = Path(f"/proc/{os.getpid()}/stat")
    while main.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    print("killed", flush=True)
    time.sleep(1)
    os._exit(0)

session = SessionFolder(Path(sys.argv[1]))
held = session.acquire()
session.write_engine("/a/socket", "1.0")
threading.Thread(target=write).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@contextlib.contextmanager
def killed_engine(session):
    """An engine that was killed and holds the session's lock for another second."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, session.folder], stdout=subprocess.PIPE
    ) as engine:
        assert engine.stdout.readline() == b"killed\n"
        yield


def test_a_resume_waits_for_the_lock_of_an_engine_that_was_killed(make_session):
    made = make_session()
    with killed_engine(made):
        made.acquire().release()


def test_a_start_waits_for_the_lock_of_a_start_that_was_killed(make_session):
    made = make_session()
    with contextlib.closing(JournalWriter(made)) as journal:
        journal.begin_attempt(0, fresh=False)
    with killed_engine(made):
        start.create_session(made.folder.parent, made.name, "run", made.config())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"pid": "x"}', "\xff", pytest.param('{"x": ' + 100_000 * "[", id="deep")],
)
def test_a_damaged_engine_file_is_no_engine(make_session, text):
    made = make_session()
    made.engine_file.write_text(text, encoding="latin-1")
    assert made.engine() is None


def test_a_session_without_an_engine_cannot_be_connected_to(make_session):
    made = make_session()
    made.write_engine("/nowhere", "1.0")
    with pytest.raises(NoSuchSessionError, match="resume"):
        Client(made, "me")


def test_an_engine_that_only_begins_is_not_to_be_started_again(make_session):
    made = make_session()
    held = made.acquire()
    with pytest.raises(NoSuchSessionError, match="just starting or ending: try again"):
        Client(made, "me")
    held.release()


def test_an_engine_on_another_host_is_named(make_session):
    made = make_session()
    held = made.acquire()
    info = {"pid": 1, "host": "far-away", "socket": "/x", "version": "1"}
    made.engine_file.write_text(json.dumps(info))
    with pytest.raises(NoSuchSessionError, match="far-away"):
        Client(made, "me")
    held.release()


@pytest.fixture
def of_another_machine(make_session, monkeypatch):
    """A session with the engine.json of an engine on a machine whose locks are not seen here."""
    monkeypatch.setattr(session_folder, "SIGN_INTERVAL", 0.2)
    made = make_session()
    info = {"pid": 1, "host": "far-away", "socket": "/x", "version": "1"}
    made.engine_file.write_text(json.dumps(info))
    return made


def test_a_session_is_not_served_while_an_engine_on_another_machine_shows_that_it_lives(
    of_another_machine,
):
    said = []
    with ThreadPoolExecutor(1) as pool:

        def notice(text):
            said.append(text)
            pool.submit(of_another_machine.show_life)

        with pytest.raises(SessionLockedError, match="pid 1 on far-away, whose lock is not seen"):
            of_another_machine.check_other_machine(notice)
    assert len(said) == 1


@pytest.mark.parametrize("write", [remove_failed_start, partial(add_note, text="a", who="me")])
def test_nothing_writes_to_the_session_of_an_engine_that_lives_on_another_machine(
    of_another_machine, write_in, write
):
    writer = write_in(of_another_machine)
    writer.journal.begin_attempt(0, fresh=False)
    writer.journal.set_meta(state="starting")
    writer.journal.close()
    ended = threading.Event()

    def live():
        while not ended.wait(0.05):
            of_another_machine.show_life()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(live)
        try:
            with pytest.raises(SessionLockedError, match="far-away, whose lock is not seen"):
                write(of_another_machine)
        finally:
            ended.set()
    with JournalReader(of_another_machine) as reader:
        assert [e.kind for e in reader.events()] == ["attempt"]


def test_the_session_of_an_engine_that_was_killed_on_another_machine_is_served(of_another_machine):
    of_another_machine.check_other_machine()


@pytest.mark.parametrize("shared", [True, False])
def test_a_machine_of_the_same_name_is_another_one(make_session, monkeypatch, shared):
    """As that of a container with a fixed name, started again elsewhere. A disk is not shared."""
    monkeypatch.setattr(session_folder, "SIGN_INTERVAL", 0.2)
    monkeypatch.setattr(session_folder, "on_network", lambda _folder: shared)
    made, said = make_session(), []
    made.write_engine("/a/socket", "1.0")
    info = json.loads(made.engine_file.read_text())
    made.engine_file.write_text(json.dumps(info | {"boot": "of another machine"}))
    with ThreadPoolExecutor(1) as pool:

        def notice(text):
            said.append(text)
            pool.submit(made.show_life)

        expected = pytest.raises(SessionLockedError) if shared else contextlib.nullcontext()
        with expected:
            made.check_other_machine(notice)
    assert len(said) == shared


def test_nobody_waits_for_an_engine_of_this_machine_or_for_none(make_session):
    made, said = make_session(), []
    made.check_other_machine(said.append)
    made.write_engine("/a/socket", "1.0")
    made.check_other_machine(said.append)
    assert not said


@pytest.mark.parametrize("state", LIVE_STATES)
def test_a_session_that_says_it_lives_and_does_not_has_crashed(writer, state):
    writer.journal.set_meta(state=state)
    with JournalReader(writer.session) as reader:
        assert reader.state() == "crashed"
        held = writer.session.acquire()
        assert reader.state() == state
        held.release()


def test_a_session_that_ends_while_its_state_is_read_has_not_crashed(writer, monkeypatch):
    writer.journal.set_meta(state="running")

    asked = []

    def is_live(_session):
        if asked:
            writer.journal.set_meta(state="finished")
        asked.append(1)
        return False

    monkeypatch.setattr(session_folder.SessionFolder, "is_live", is_live)
    with JournalReader(writer.session) as reader:
        assert reader.state() == "finished"


@pytest.mark.parametrize("state", ENDED_STATES)
def test_a_session_that_has_ended_says_so_whoever_holds_it(writer, state):
    writer.journal.set_meta(state=state)
    with JournalReader(writer.session) as reader:
        assert reader.state() == state


def test_starts_at_once_without_a_name_get_different_ones(tmp_path, monkeypatch):
    config = config_file.load(starter.FOLDER / "demo.yaml")

    def taken_meanwhile(root, stem):
        free = session_folder.free_name(root, stem)
        if free == "run":
            session_folder.create(root, free, config)  # by another start
        return free

    monkeypatch.setattr(start, "free_name", taken_meanwhile)
    assert start.create_session(tmp_path / "sessions", None, "run", config).name == "run-2"
