"""What a machine that joins makes of what it hears from the first one."""

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
    """The first machine's store."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def invitation(folder, start="a", **changed):
    content = JoinInfo(launch=LaunchConfig(), folder=str(folder), processes=1, start=start)
    return json.dumps(msgspec.to_builtins(content) | changed)


@pytest.mark.parametrize("changed", [{"software": "0"}, {"launch": {"unheard_of": 1}}])
def test_another_version_is_told_whatever_else_it_says(tmp_path, changed):
    assert join.read(invitation(tmp_path, **changed)) == join.OTHER_VERSION


def test_a_folder_that_is_not_shared_is_told(tmp_path):
    assert "file system they share" in join.read(invitation(tmp_path / "elsewhere"))


def test_ranks_that_were_left_are_not_joined_again(first, tmp_path):
    first.set("invitation", invitation(tmp_path, start="a"))
    later = invitation(tmp_path, start="b")
    threading.Timer(0.2, first.set, ("invitation", later)).start()
    _, found = join.await_invitation(f"127.0.0.1:{first.port}", wait=60, left="a")
    assert found.start == "b"


def test_a_first_machine_that_is_gone_is_noticed():
    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    there = TCPStore("127.0.0.1", first.port, is_master=False)
    first.set("invitation", "")
    there.get("invitation")  # what one client sets, another may ask for before it is there
    assert join.is_there(there)
    del first
    assert not join.is_there(there)
