"""How a joining machine finds the run of the first machine."""

import contextlib
import json
import threading

import msgspec
import pytest

from engine.config.sections.launch import LaunchConfig
from engine.errors import LinkError, UserInputError
from engine.launch.secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE
from engine.launch.store_server import StoreServer
from engine.protocol.machines.store_messages import CheckKeys, DeleteKey, SetKeys
from engine.protocol.rank_messages import JOIN_INFO_KEY, STARTED_KEY, WAITING_KEY, JoinInfo
from engine.session.folder import write_atomically
from engine.train.torchrun import join

SECRET = "a secret of one run"  # noqa: S105 - of a test


@pytest.fixture
def first():
    """The store of the first machine."""
    with contextlib.closing(StoreServer("127.0.0.1:0", SECRET.encode())) as server:
        yield server


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file with the secret, and nothing in the environment."""
    for name in (SECRET_VARIABLE, SECRET_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(join, "RETRY", 0.05)
    path = tmp_path / "join.secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


def join_info(folder, start="a", **changed):
    content = JoinInfo(launch=LaunchConfig(), folder=str(folder), processes=1, start=start)
    return json.dumps(msgspec.to_builtins(content) | changed).encode()


def publish(first, folder, start):
    first.values.handle(SetKeys(values={JOIN_INFO_KEY: join_info(folder, start)}))


@pytest.mark.parametrize("changed", [{"software": "0"}, {"launch": {"unheard_of": 1}}])
def test_another_version_is_reported_whatever_else_differs(tmp_path, changed):
    with pytest.raises(UserInputError, match="another version"):
        join.decode_join_info(join_info(tmp_path, **changed))


def test_a_folder_that_is_not_shared_is_reported(tmp_path):
    with pytest.raises(UserInputError, match="file system they share"):
        join.decode_join_info(join_info(tmp_path / "elsewhere"))


def test_lost_ranks_are_not_joined_again(first, file, tmp_path):
    publish(first, tmp_path, "a")
    threading.Timer(0.2, publish, (first, tmp_path, "b")).start()
    found = join.find_run(f"127.0.0.1:{first.port}", file, 60, previous_start="a")
    assert (found.info.start, found.secret) == ("b", SECRET)


def test_the_secret_of_an_earlier_run_is_read_again_until_the_new_one_has_written_its(
    first, file, tmp_path
):
    publish(first, tmp_path, "a")
    file.write_text("a secret of an earlier run")
    threading.Timer(0.2, write_atomically, (file, SECRET)).start()
    assert join.find_run(f"127.0.0.1:{first.port}", file, 60, "").info.start == "a"


def test_a_machine_that_comes_late_asks_to_take_part_in_the_next_start(first, file, tmp_path):
    elastic = {"launch": {"nodes": 3, "min_nodes": 1}}
    begun = {JOIN_INFO_KEY: join_info(tmp_path, "a", **elastic), STARTED_KEY: b"1"}
    first.values.handle(SetKeys(values=begun))

    def start_again():
        first.values.handle(DeleteKey(key=STARTED_KEY))
        publish(first, tmp_path, "b")

    threading.Timer(0.3, start_again).start()
    assert join.find_run(f"127.0.0.1:{first.port}", file, 60, "").info.start == "b"
    assert first.values.handle(CheckKeys(keys=[WAITING_KEY])).number


def test_a_run_with_another_secret_is_not_joined(first, file, monkeypatch):
    address = f"127.0.0.1:{first.port}"
    file.write_text("a secret of another run")
    with pytest.raises(LinkError, match="another secret"):
        join.find_run(address, file, 0.2, "")
    monkeypatch.setenv(SECRET_VARIABLE, "a secret of another run")
    with pytest.raises(UserInputError, match="another secret"):
        join.find_run(address, None, 60, "")


def test_without_a_secret_nothing_is_joined(first, file):
    with pytest.raises(UserInputError, match="no secret"):
        join.find_run(f"127.0.0.1:{first.port}", None, 60, "")
    with pytest.raises(LinkError, match="no file"):
        join.find_run(f"127.0.0.1:{first.port}", file.with_name("later"), 0.2, "")


def test_the_end_of_the_first_machine_is_detected(first, file, tmp_path):
    publish(first, tmp_path, "a")
    store = join.find_run(f"127.0.0.1:{first.port}", file, 60, "").store
    assert store.is_alive(JOIN_INFO_KEY)
    first.close()
    assert not store.is_alive(JOIN_INFO_KEY)
