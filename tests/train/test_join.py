"""How a joining machine handles the join info of the first machine."""

import json
import threading

import msgspec
import pytest
from torch.distributed import TCPStore

from engine.config.sections.launch import LaunchConfig
from engine.protocol.rank_messages import JoinInfo
from engine.train.torchrun import join
from engine.train.torchrun.rendezvous import JOIN_INFO_KEY


@pytest.fixture
def first():
    """The store of the first machine."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def join_info(folder, start="a", **changed):
    content = JoinInfo(launch=LaunchConfig(), folder=str(folder), processes=1, start=start)
    return json.dumps(msgspec.to_builtins(content) | changed)


@pytest.mark.parametrize("changed", [{"software": "0"}, {"launch": {"unheard_of": 1}}])
def test_another_version_is_reported_whatever_else_differs(tmp_path, changed):
    assert join.decode_join_info(join_info(tmp_path, **changed)) == join.OTHER_VERSION


def test_a_folder_that_is_not_shared_is_reported(tmp_path):
    assert "file system they share" in join.decode_join_info(join_info(tmp_path / "elsewhere"))


def test_lost_ranks_are_not_joined_again(first, tmp_path):
    first.set(JOIN_INFO_KEY, join_info(tmp_path, start="a"))
    later = join_info(tmp_path, start="b")
    threading.Timer(0.2, first.set, (JOIN_INFO_KEY, later)).start()
    _, found = join.wait_for_join_info(f"127.0.0.1:{first.port}", 60, previous_start="a")
    assert found.start == "b"


def test_the_end_of_the_first_machine_is_detected():
    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = TCPStore("127.0.0.1", first.port, is_master=False)
    first.set(JOIN_INFO_KEY, "")
    other.get(JOIN_INFO_KEY)  # a client may read a key before another client's set arrives
    assert join.is_alive(other)
    del first
    assert not join.is_alive(other)
