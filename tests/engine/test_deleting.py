"""Sessions and temporary folders are deleted, also on NFS, where open files keep their folder."""

import contextlib
import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.errors import SessionError, SessionNameError
from engine.launch.failed_start import remove_failed_start
from engine.session.folder import all_sessions
from engine.session.temporary_folders import LOCK_NAME, PREFIX, remove_abandoned
from rlhf_tui.cli import cli

FILES = Path("/proc/self/fd")


@pytest.fixture
def nfs(monkeypatch):
    """Folders are removed as on NFS: a file that is open when it is deleted stays in its folder."""
    rmdir = os.rmdir

    def opened():
        for fd in FILES.iterdir():
            with contextlib.suppress(FileNotFoundError):  # of the listing itself
                yield str(fd.readlink())

    def rmdir_on_nfs(path, *, dir_fd=None):
        folder = path if dir_fd is None else (FILES / str(dir_fd)).readlink() / path
        if any(file.startswith(f"{folder}/") and file.endswith(" (deleted)") for file in opened()):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), folder)
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir_on_nfs)


def delete(session):
    root = session.folder.parent
    return CliRunner().invoke(cli, ["rm", "-y", session.name, "--sessions", str(root)])


def test_nothing_is_left_of_a_session_that_is_deleted_on_nfs(make_session, nfs):
    session = make_session()
    assert delete(session).exit_code == 0
    assert not session.folder.exists()


def test_a_session_that_failed_to_start_gives_up_its_name_on_nfs(make_session, write_in, nfs):
    writer = write_in(make_session("run"))
    writer.journal.begin_attempt(0, fresh=False)
    writer.journal.set_meta(state="failed")
    writer.journal.close()
    remove_failed_start(writer.session)
    assert make_session("run").config_file.is_file()


def test_a_session_that_cannot_be_deleted_whole_is_listed_and_deleted_later(make_session, nfs):
    session = make_session()
    with (session.checkpoints / "weights").open("wb"):  # as another program reads it
        failed = delete(session)
        assert isinstance(failed.exception, SessionError)
        assert "Directory not empty" in str(failed.exception)
    assert all_sessions(session.folder.parent) == [session]
    assert delete(session).exit_code == 0
    assert not session.folder.exists()


def test_a_link_to_a_session_is_not_deleted_with_what_is_there(make_session, tmp_path):
    session = make_session()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "run").symlink_to(session.folder)
    linked = CliRunner().invoke(cli, ["rm", "-y", "run", "--sessions", str(tmp_path / "links")])
    assert str(linked.exception).endswith("links/run: it is a symbolic link")
    assert session.config_file.is_file()


def test_a_session_that_took_the_place_of_the_locked_one_is_not_deleted(make_session):
    """As while `rm` waits for an answer."""
    session = make_session("run")
    lock = session.acquire()
    session.folder.rename(session.folder.with_name("moved"))
    make_session("run")
    with pytest.raises(OSError, match="moved or replaced meanwhile"):
        session.delete(lock)
    lock.release()
    assert [found.name for found in all_sessions(session.folder.parent)] == ["moved", "run"]


def test_nothing_is_left_of_an_abandoned_temporary_folder_on_nfs(tmp_path, nfs):
    folder = tmp_path / f"{PREFIX}abandoned"
    folder.mkdir()
    (folder / LOCK_NAME).touch()
    os.utime(folder / LOCK_NAME, (1, 1))  # long ago
    remove_abandoned(tmp_path)
    assert not folder.exists()


def test_a_folder_that_a_killed_deletion_leaves_is_named_to_whoever_wants_its_name(make_session):
    make_session("run").config_file.unlink()
    with pytest.raises(SessionNameError, match="is not a session: remove it"):
        make_session("run")
