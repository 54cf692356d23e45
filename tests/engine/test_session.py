"""A session's folder: its name, who is in it, what state it is in, where it can start."""

import errno
import json
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import starter
from engine.config import file as config_file
from engine.config.settings import SettingChange
from engine.errors import (
    ConfigError,
    DamagedCheckpointError,
    NoSuchSessionError,
    SessionError,
    SessionLockedError,
    SessionNameError,
    UserInputError,
)
from engine.journal import labels
from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter
from engine.launch.start import (
    StartOptions,
    adopted_checkpoint,
    check_inputs,
    checkpoint_steps,
    fork,
    is_new,
    last_checkpoint,
    resume,
    timeline_checkpoints,
)
from engine.protocol.client import Client
from engine.session import folder as session_folder
from engine.session import registry
from engine.session.states import ENDED_STATES, LIVE_STATES
from engine.session.temporary import LOCK, TemporaryFolder

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
        "import tempfile, os; from engine.session.temporary import TemporaryFolder\n"
        f"tempfile.tempdir = {str(tmp_path)!r}; folder = TemporaryFolder(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (abandoned,) = tmp_path.iterdir()
    alive = TemporaryFolder()
    for folder in (abandoned, alive.path):
        os.utime(folder / LOCK, (1, 1))  # long ago
    newest = TemporaryFolder()
    assert set(tmp_path.iterdir()) == {alive.path, newest.path}
    for folder in (alive, newest):
        folder.close()
    assert not list(tmp_path.iterdir())


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
        session = session_folder.Session(session.folder.with_name("link"))
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
    with JournalReader(session_folder.find(session.folder.parent, session.name)) as record:
        assert record.last_step() == 2


def test_another_users_session_can_be_read_and_not_steered(another_user):
    with JournalReader(session_folder.find(another_user.folder.parent, "run")) as record:
        assert record.last_step() == 2
    with pytest.raises(SessionError, match="belongs to user root"):
        Client(another_user, "me")


def test_a_sessions_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    config = config_file.load(starter.FOLDER / "demo.yaml")
    with pytest.raises(SessionError, match="cannot create"):
        session_folder.create(tmp_path / "file", "run", config)


def test_a_session_is_held_by_one_engine_which_is_named(make_session):
    made = make_session()
    held = made.acquire()
    made.write_engine("/a/socket", "1.0")
    with pytest.raises(SessionLockedError, match=f"pid {made.engine().pid} on "):
        made.acquire()
    assert made.is_live()
    held.release()
    assert not made.is_live()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\xff"])
def test_a_damaged_engine_file_is_no_engine(make_session, text):
    made = make_session()
    made.engine_file.write_text(text, encoding="latin-1")
    assert made.engine() is None


def test_a_session_without_an_engine_cannot_be_connected_to(make_session):
    made = make_session()
    made.write_engine("/nowhere", "1.0")
    with pytest.raises(NoSuchSessionError, match="resume"):
        Client(made, "me")


def test_an_engine_on_another_host_is_named(make_session):
    made = make_session()
    held = made.acquire()
    info = {"pid": 1, "host": "far-away", "socket": "/x", "version": "1"}
    made.engine_file.write_text(json.dumps(info))
    with pytest.raises(NoSuchSessionError, match="far-away"):
        Client(made, "me")
    held.release()


@pytest.mark.parametrize("state", LIVE_STATES)
def test_a_session_that_says_it_lives_and_does_not_has_crashed(writer, state):
    writer.journal.set_meta(state=state)
    with JournalReader(writer.session) as record:
        assert record.state() == "crashed"
        held = writer.session.acquire()
        assert record.state() == state
        held.release()


@pytest.mark.parametrize("state", ENDED_STATES)
def test_a_session_that_has_ended_says_so_whoever_holds_it(writer, state):
    writer.journal.set_meta(state=state)
    with JournalReader(writer.session) as record:
        assert record.state() == state


def test_a_run_goes_on_from_the_last_whole_checkpoint_of_its_timeline(writer):
    for step in (2, 4, 6):
        writer.checkpoint(step)
    assert last_checkpoint(writer.session) == 6
    (writer.session.checkpoints / "step-000006" / "COMPLETE").unlink()
    assert last_checkpoint(writer.session) == 4
    writer.journal.begin_attempt(2, fresh=True)
    assert last_checkpoint(writer.session) == 2
    assert checkpoint_steps(writer.session) == [2, 4]


def test_a_checkpoint_of_a_timeline_that_was_left_is_no_place_to_go_on_from(writer):
    # It would leave a gap: the steps up to it are not this timeline's.
    for step in (2, 4):
        writer.checkpoint(step)
    writer.journal.begin_attempt(2, fresh=True)
    given = {"from_step": 4, "reseed": False, "overrides": [], "who": "me"}
    for going_on in (
        lambda: resume(writer.session, **given),
        lambda: fork(writer.session, "child", **given),
    ):
        with pytest.raises(NoSuchSessionError, match=r"it has: 2\)"):
            going_on()
    assert timeline_checkpoints(writer.session) == [2]


def test_nor_is_one_that_was_whole_before_the_journal_heard_of_it(writer):
    writer.checkpoint(2)
    writer.journal.record_checkpoint(4, 1000, 0.5, 1.5)
    (writer.session.checkpoints / "step-000004").mkdir()
    (writer.session.checkpoints / "step-000004" / "COMPLETE").touch()
    assert last_checkpoint(writer.session) == 4
    writer.journal.begin_attempt(2, fresh=True)
    assert last_checkpoint(writer.session) == 2


@pytest.fixture
def without_journal(make_session, write_in):
    """A session with two complete checkpoints whose journal is lost."""
    session = make_session()
    before = write_in(session)
    before.journal.begin_attempt(0, fresh=False)
    for step in (4, 8):
        before.checkpoint(step)
    before.journal.close()
    for file in (session.journal_file, session.samples_file):
        file.unlink()
    return session


@pytest.mark.parametrize("problem", ["is missing", "is empty"])
def test_a_resume_without_a_journal_does_not_start_over_from_step_0(without_journal, problem):
    if problem == "is empty":
        without_journal.journal_file.touch()
    with pytest.raises(UserInputError, match=rf"journal\.db {problem};.*resume run --from 8$"):
        resume(without_journal, from_step=None, reseed=False, overrides=[], who="me")


def test_a_resume_from_a_damaged_checkpoint_is_refused_before_it_abandons_steps(writer):
    writer.steps(1, 2, 3, 4)
    for step in (2, 4):
        writer.checkpoint(step)
    (writer.session.checkpoints / "step-000002" / "state.json").write_text("{")
    with pytest.raises(DamagedCheckpointError, match="nothing was changed"):
        resume(writer.session, from_step=2, reseed=False, overrides=[], who="me")


def test_a_session_whose_journal_is_lost_is_not_new(without_journal):
    # A new one is removed when its configuration turns out to be wrong.
    assert not is_new(without_journal, StartOptions(from_step=8))


def test_a_chosen_checkpoint_can_be_resumed_from_without_a_journal(without_journal, write_in):
    state_file = without_journal.checkpoints / "step-000008" / "state.json"
    state_file.write_text('{"score": 0.5, "hashes": {}}')
    start = resume(without_journal, from_step=8, reseed=False, overrides=[], who="me")
    assert (start.from_step, start.fresh) == (8, True)
    new = write_in(without_journal)
    adopted = adopted_checkpoint(without_journal, 8)
    new.journal.begin_attempt(8, fresh=True, adopt=adopted)
    # An attempt that fails before its first save starts again from there.
    assert last_checkpoint(without_journal) == 8
    assert new.journal.timeline() == [8]
    with JournalReader(without_journal) as record:
        assert [(c.step, c.score) for c in record.checkpoints()] == [(8, 0.5)]
    assert adopted_checkpoint(without_journal, 8) is None
    new.journal.close()


def test_who_is_to_sample_anew_does_so_until_a_checkpoint_knows_of_it(writer):
    journal = writer.journal
    journal.begin_attempt(4, fresh=True, reseed=True)
    anew = journal.attempt
    journal.begin_attempt(4, fresh=False)  # it crashed before the next save
    assert journal.reseeded(4) == anew
    journal.begin_attempt(8, fresh=False)
    assert (journal.reseeded(8), journal.reseeded(4)) == (0, anew)
    journal.begin_attempt(2, fresh=False)  # what was saved at 4 is gone, and with it the wish
    assert journal.reseeded(4) == 0
    journal.begin_attempt(4, fresh=True, reseed=True)
    journal.begin_attempt(4, fresh=True)
    assert journal.reseeded(4) == 0


def test_overrides_that_are_settings_are_changes_from_the_next_step_on(writer):
    start = resume(
        writer.session,
        from_step=None,
        reseed=False,
        overrides=["kl.beta=0.7", "train.steps=999"],
        who="me",
    )
    assert [(c.key, c.new) for c in start.changes] == [("beta", 0.7)]
    assert not start.fresh


def test_a_fork_that_is_refused_leaves_nothing(writer):
    writer.checkpoint(2)
    given = {"reseed": False, "who": "me"}
    root = writer.session.folder.parent
    for name, step, overrides, error in (
        ("child", 3, [], NoSuchSessionError),
        ("child", 2, ["ppo.epocs=1"], ConfigError),
        ("child", 2, ["data.prompts=/nowhere.jsonl"], ConfigError),
        ("../child", 2, [], SessionNameError),
        ("run", 2, [], SessionNameError),
    ):
        with pytest.raises(error):
            fork(writer.session, name, from_step=step, overrides=overrides, **given)
    assert [f.name for f in root.iterdir()] == ["run"]


def test_a_fork_that_cannot_copy_the_past_leaves_nothing_and_says_why(make_session, write_in):
    writer = write_in(make_session())
    writer.journal.begin_attempt(0, fresh=False)
    writer.steps(*range(1, 50))
    writer.checkpoint(2)
    writer.journal.close()
    with writer.session.samples_file.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 20_000)  # its first page tells nothing of it
    with pytest.raises(SessionError, match="cannot copy run to child"):
        fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    assert [f.name for f in writer.session.folder.parent.iterdir()] == ["run"]


def test_a_fork_of_an_archive_that_nobody_can_write_in(make_session, write_in, monkeypatch):
    writer = write_in(make_session())
    writer.journal.begin_attempt(0, fresh=False)
    writer.steps(1, 2)
    writer.checkpoint(2)
    writer.journal.close()
    # Root may write anywhere: what a read-only folder does to SQLite is made by hand.
    connect = sqlite3.connect

    def without_writing(database, **options):
        if "mode=ro" in str(database) and "immutable" not in str(database):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(database, **options)

    monkeypatch.setattr(sqlite3, "connect", without_writing)
    child, _ = fork(writer.session, "child", from_step=2, reseed=False, overrides=[], who="me")
    with JournalReader(child) as record:
        assert record.last_step() == 2


def test_a_fork_shares_its_checkpoint_and_changes_nothing_in_the_source(writer):
    writer.steps(1, 2, 3)
    writer.checkpoint(2)
    child, start = fork(
        writer.session, "child", from_step=2, reseed=False, overrides=["kl.beta=0.7"], who="me"
    )
    assert checkpoint_steps(child) == [2]
    assert start.origin == {"from": "run", "step": 2}
    assert child.config().kl.beta == 0.7
    assert writer.session.config().kl.beta != 0.7


@pytest.mark.parametrize("action", ["fork", "resume"])
def test_the_old_value_of_an_override_is_that_of_the_checkpoint(writer, action):
    writer.steps(1, 2, 3)
    writer.checkpoint(2)
    writer.journal.set_meta(settings={"beta": 0.1})  # of step 4
    state = {"state": {"settings": {"beta": 0.25}}, "score": 0.5, "kl": 1.5, "hashes": {}}
    folder = writer.session.checkpoints / "step-000002"
    (folder / "state.json").write_text(json.dumps(state))
    given = {"reseed": False, "overrides": ["kl.beta=0.3"], "who": "me"}
    if action == "fork":
        start = fork(writer.session, "child", from_step=2, **given)[1]
    else:
        start = resume(writer.session, from_step=2, **given)
    assert start.changes == [SettingChange(key="beta", old=0.25, new=0.3)]
    latest = resume(writer.session, from_step=None, **given)
    assert latest.changes == [SettingChange(key="beta", old=0.1, new=0.3)]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.prompts=/nowhere/p.jsonl", "data.prompts: no file at"),
        ("model.policy=/nowhere", "model.policy: the folder /nowhere does not exist"),
        ("reward.model=/", "reward.model: the folder / holds no config.json"),
        ("eval={every: 1, prompts: /nowhere/p.jsonl}", "eval.prompts: no file at"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_made(override, says):
    with pytest.raises(ConfigError, match=says):
        check_inputs(config_file.load(starter.FOLDER / "demo.yaml", [override]))


def test_the_list_of_live_sessions_is_a_hint_that_heals_itself(make_session, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert registry.live_sessions() == []
    living, dead = make_session("living"), make_session("dead")
    registry.announce(living)
    registry.announce(dead)
    folder = tmp_path / "state" / "rlhf-tui" / "live"
    (folder / "half-written").touch()
    (folder / "nonsense").write_bytes(b"\xff\xfe")
    held = living.acquire()
    assert registry.live_sessions() == [living]
    assert len(list(folder.iterdir())) == 3
    held.release()
    registry.withdraw(living)
    assert registry.live_sessions() == []


def test_a_state_folder_that_cannot_be_written_costs_nothing_but_a_line(
    make_session, tmp_path, monkeypatch, caplog
):
    (tmp_path / "state").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    registry.announce(make_session())
    assert "will not be listed" in caplog.text


def test_a_session_of_another_user_is_one_line_that_says_so(make_session):
    made = make_session()
    made.folder.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # whom no mode keeps out
            os.seteuid(65534)
        with pytest.raises(SessionError, match=r"cannot read .*: Permission denied"):
            session_folder.find(made.folder.parent, made.name)
    finally:
        os.seteuid(user)
        made.folder.chmod(0o700)


def test_a_list_that_cannot_be_written_keeps_its_stale_entries(make_session, tmp_path, monkeypatch):
    def refuse(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    registry.announce(make_session())
    monkeypatch.setattr(Path, "unlink", refuse)
    assert registry.live_sessions() == []
