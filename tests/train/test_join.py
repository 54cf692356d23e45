"""How a joining machine handles the join information of the first machine."""

import json
import threading

import msgspec
import pytest
from torch.distributed import TCPStore

from engine.config.schema import LaunchConfig
from engine.protocol.rank_messages import JoinInfo
from engine.train.torchrun import join


@pytest.fixture
def first():
    """The store of the first machine."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def invitation(folder, start="a", **changed):
    content = JoinInfo(launch=LaunchConfig(), folder=str(folder), processes=1, start=start)
    return json.dumps(msgspec.to_builtins(content) | changed)


@pytest.mark.parametrize("changed", [{"software": "0"}, {"launch": {"unheard_of": 1}}])
def test_another_version_is_an_error_whatever_else_the_message_contains(tmp_path, changed):
    assert join.read(invitation(tmp_path, **changed)) == join.OTHER_VERSION


def test_a_folder_that_is_not_shared_is_an_error(tmp_path):
    assert "file system they share" in join.read(invitation(tmp_path / "elsewhere"))


def test_a_rank_group_that_was_left_is_not_joined_again(first, tmp_path):
    first.set("invitation", invitation(tmp_path, start="a"))
    later = invitation(tmp_path, start="b")
    threading.Timer(0.2, first.set, ("invitation", later)).start()
    _, found = join.await_invitation(f"127.0.0.1:{first.port}", wait=60, left="a")
    assert found.start == "b"


def test_the_end_of_the_first_machine_is_detected():
    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    there = TCPStore("127.0.0.1", first.port, is_master=False)
    first.set("invitation", "")
    there.get("invitation")  # until the value that another client sets is there
    assert join.is_there(there)
    del first
    assert not join.is_there(there)
