"""One engine a session, and a socket that is reached however deep it lies."""

import os
import socket
import stat
import subprocess
import sys
import tempfile

import psutil
import pytest

from engine.config.sections.launch import LaunchConfig
from engine.errors import SessionError, SessionLockedError
from engine.protocol import sockets
from engine.session import lock
from engine.session.access import MAX_BYTES, open_to_append, open_to_umask, read_bytes
from engine.session.folder import SessionFolder
from engine.supervisor.processes.rank_processes import RankProcesses

HOLD = """
import sys
from pathlib import Path
from engine.session.lock import SessionLock
held = SessionLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""

LEASE = """
import fcntl, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDWR)
signal.signal(signal.SIGIO, lambda *_: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK))
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
while True:
    signal.pause()
"""
"""Takes a lease, and gives it back when the kernel asks for it, as an NFS server does."""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a lock until it is told, or killed."""
    path = tmp_path / "engine.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield path, process
    process.kill()
    process.communicate()


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    path = tmp_path / "engine.lock"
    held = lock.SessionLock(path)
    with pytest.raises(SessionLockedError):
        lock.SessionLock(path)
    held.release()
    lock.SessionLock(path).release()


def test_asking_does_not_take_it(tmp_path):
    path = tmp_path / "engine.lock"
    assert not lock.is_held(path)
    assert not path.exists()
    held = lock.SessionLock(path)
    assert lock.is_held(path)
    assert lock.is_held(path)
    held.release()
    assert not lock.is_held(path)


def test_a_lock_that_cannot_be_looked_at_is_not_taken_for_free(tmp_path):
    path = tmp_path / "engine.lock"
    path.symlink_to(path)
    with pytest.raises(SessionError, match="cannot tell whether an engine holds"):
        lock.is_held(path)
    assert not lock.is_held(tmp_path / "nowhere" / "engine.lock")


def test_another_process_is_seen_and_refuses(holder):
    path, _ = holder
    assert lock.is_held(path)
    with pytest.raises(SessionLockedError):
        lock.SessionLock(path)


def test_a_lock_goes_with_its_process_however_that_ends(holder):
    path, process = holder
    process.kill()
    process.communicate()
    assert path.exists()
    assert not lock.is_held(path)
    lock.SessionLock(path).release()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_whose_file_was_deleted_is_taken_again(tmp_path, replaced):
    path = tmp_path / "engine.lock"
    held = lock.SessionLock(path)
    assert not held.restore()
    path.unlink()
    if replaced:
        path.touch()
    assert not lock.is_held(path)
    assert held.restore()
    assert lock.is_held(path)
    held.release()
    assert not lock.is_held(path)


def test_a_lock_that_another_process_took_after_its_file_was_deleted_is_lost(tmp_path):
    path = tmp_path / "engine.lock"
    held = lock.SessionLock(path)
    path.unlink()
    other = lock.SessionLock(path)
    with pytest.raises(SessionLockedError):
        held.restore()
    other.release()
    assert held.restore()
    held.release()


def test_a_child_does_not_inherit_it(tmp_path):
    path = tmp_path / "engine.lock"
    held = lock.SessionLock(path)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    held.release()
    assert not lock.is_held(path)
    child.communicate()


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(SessionError, match="cannot lock"):
        lock.SessionLock(tmp_path / "nowhere" / "engine.lock")


def deep(tmp_path):
    folder = tmp_path.joinpath(*(["a-folder-with-a-long-name"] * 8))
    folder.mkdir(parents=True)
    return folder


def test_a_socket_is_reached_by_a_path_longer_than_an_address(tmp_path):
    folder = deep(tmp_path)
    listener, path = sockets.listen(folder)
    assert len(str(path)) > 108
    assert path.parent == folder
    with listener, sockets.connect(path) as client:
        server, _ = listener.accept()
        with server:
            client.sendall(b"hello")
            assert server.recv(5) == b"hello"
            assert sockets.peer_uid(server) == os.getuid()


def test_a_socket_is_its_owners_alone(tmp_path):
    listener, path = sockets.listen(tmp_path)
    with listener:
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_modes_are_set_without_changing_the_umask_of_other_threads(tmp_path, monkeypatch):
    mask = os.umask(0o027)
    monkeypatch.setattr(os, "umask", None)  # whose calls fail from now on
    try:
        sock, path = sockets.listen(tmp_path)
        (tmp_path / "model").mkdir(mode=0o700)  # as a copy of a checkpoint's folder
        (tmp_path / "model" / "weights").write_text("")
        open_to_umask(tmp_path / "model")
    finally:
        monkeypatch.undo()
        os.umask(mask)
    with sock:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "model" / "weights").stat().st_mode) == 0o640


def test_a_stale_socket_or_file_gives_way(tmp_path):
    for _ in range(2):
        listener, path = sockets.listen(tmp_path)
        listener.close()
        assert path.exists()
        with pytest.raises(ConnectionRefusedError):
            sockets.connect(path)
    path.unlink()
    path.write_text("a file")
    sockets.listen(tmp_path)[0].close()


def test_where_no_socket_can_lie_it_lies_in_a_folder_of_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    folder, other = tmp_path / "no-sockets-here", tmp_path / "nor-here"
    for each in (folder, other):  # a folder in its place stands for a file system without sockets
        (each / sockets.NAME).mkdir(parents=True)
    listener, path = sockets.listen(folder)
    with listener, sockets.listen(other)[0]:
        assert path.parent.parent == tmp_path / "tmp"
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        sockets.connect(path).close()
        listener.settimeout(10)  # the other one has not taken its place
        listener.accept()[0].close()


def test_a_folder_in_tmp_that_others_can_enter_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"rlhf-tui-{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)
    folder = tmp_path / "folder"
    (folder / sockets.NAME).mkdir(parents=True)
    with pytest.raises(SessionError, match="cannot create a socket"):
        sockets.listen(folder)
    own.rmdir()
    own.symlink_to(folder)
    with pytest.raises(SessionError, match="cannot create a socket"):
        sockets.listen(folder)


CONNECT = """
import os, sys
from pathlib import Path
from engine.protocol import sockets
with sockets.connect(Path(sys.argv[1])) as sock:
    sock.sendall(bytes([os.getpid()]))
    sock.recv(1)
"""


def test_a_peer_in_another_pid_namespace_has_its_own_id_here(tmp_path):
    """A rank's id is where its process group is killed: as it knows itself it may be another's."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces of its own")
    listener, path = sockets.listen(tmp_path)
    with listener, subprocess.Popen([*unshare, sys.executable, "-c", CONNECT, path]) as process:
        listener.settimeout(60)
        peer = listener.accept()[0]
        with peer:
            peer.settimeout(60)
            assert peer.recv(1) == b"\x01"
            assert psutil.Process(sockets.peer_pid(peer)).ppid() == process.pid


def test_a_rank_that_cannot_be_seen_is_not_signalled(tmp_path):
    """As a process group 0 is the supervisor's own."""
    ranks = RankProcesses(SessionFolder(tmp_path), tmp_path / "engine.sock", LaunchConfig())
    ranks.rank_connected(0, 0)
    assert ranks.pids == {}


def test_nobody_listening_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        sockets.connect(tmp_path / "nobody.sock")
    with pytest.raises(OSError):
        sockets.connect(tmp_path / "nowhere" / "nobody.sock")


def test_a_file_that_is_too_large_to_describe_an_engine_is_not_read(tmp_path):
    session = SessionFolder(tmp_path)
    session.write_engine("/a/socket", "1.0")
    assert session.engine() is not None
    with session.engine_file.open("ab") as file:
        file.write(b" " * MAX_BYTES)
    assert session.engine() is None


def test_a_file_with_a_lease_is_read_when_the_lease_has_been_given_back(tmp_path):
    path = tmp_path / "state.json"
    path.write_bytes(b"content")
    other = subprocess.Popen([sys.executable, "-c", LEASE, path], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"

        assert read_bytes(path) == b"content"
    finally:
        other.kill()
        other.communicate()


def test_a_socket_in_place_of_a_file_is_named_as_no_file(tmp_path):
    path = tmp_path / "engine.log"
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(path))

        with pytest.raises(OSError, match="not a regular file"):
            open_to_append(path)
