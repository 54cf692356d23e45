"""The list of live sessions of this user, in all folders."""

import errno
import os
import pwd
from pathlib import Path

import pytest

from engine.errors import SessionError, SessionNameError
from engine.session import folder as session_folder
from engine.session import registry


def test_sessions_of_the_same_name_are_listed_with_their_folders(tmp_path):
    sessions = [
        session_folder.SessionFolder(tmp_path / path) for path in ("x/one", "x/same", "y/same")
    ]
    expected = f"one, same in {tmp_path}/x, same in {tmp_path}/y"
    assert registry.names_of(sessions) == expected


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
    living.lock_file.unlink()
    living.lock_file.symlink_to(living.lock_file)  # it cannot be told whether it is held
    assert registry.live_sessions() == [living]
    registry.withdraw(living)
    assert registry.live_sessions() == []


@pytest.mark.parametrize("name", ["日本", "two\nlines", "a\r\nb", "a\u2028b", "a\x0cb "])
def test_a_live_session_is_listed_whatever_characters_its_path_has(
    make_session, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    session = session_folder.create(tmp_path / name, "run", make_session().config())
    held = session.acquire()
    registry.announce(session)
    assert registry.live_sessions() == [session]
    held.release()
    assert registry.live_sessions() == []
    assert not list((tmp_path / "state").rglob("live/*"))


def test_a_list_of_live_sessions_that_cannot_be_read_is_empty(tmp_path, monkeypatch):
    """As after the program was once run with sudo, in a home folder that is this user's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "state" / "rlhf-tui" / "live").mkdir(parents=True)
    (tmp_path / "state").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        assert registry.live_sessions() == []
    finally:
        os.seteuid(user)
        (tmp_path / "state").chmod(0o700)


def test_an_engine_that_begins_while_the_list_is_read_stays_in_it(
    make_session, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    session, held = make_session(), []
    registry.announce(session)  # stale: its engine was killed
    is_live = session_folder.SessionFolder.may_be_live

    def begins_meanwhile(asked):
        live = is_live(asked)
        if not held:
            held.append(session.acquire())
            registry.announce(session)
        return live

    monkeypatch.setattr(session_folder.SessionFolder, "may_be_live", begins_meanwhile)
    assert registry.live_sessions() == [session]
    assert registry.live_sessions() == [session]
    held[0].release()


def test_of_several_live_sessions_elsewhere_with_one_name_none_is_chosen(make_session, tmp_path):
    config = make_session().config()
    near, far = (session_folder.create(tmp_path / f"{n} runs", "same", config) for n in "ab")
    with pytest.raises(SessionNameError) as caught:
        session_folder.find(tmp_path / "here", "same", [near, far])
    assert f"add --sessions '{tmp_path}/a runs' or '{tmp_path}/b runs'" in str(caught.value)
    assert session_folder.find(near.folder.parent, "same", [near, far]) == near
    assert session_folder.find(tmp_path / "here", "same", [far]) == far


def test_a_user_without_a_home_has_no_live_sessions(monkeypatch):
    def unknown(_uid):
        raise KeyError

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
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
