"""Where the agents of several machines meet."""

import base64
import os
import pickle
import socket
import threading

import pytest
import torch.distributed as dist

from engine.errors import LinkError
from engine.train.torchrun.rendezvous import StoreRendezvous


@pytest.fixture
def store():
    """The first machine's store, with an address for the others."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(store, machines, *, first, timeout=60.0):
    place = f"127.0.0.1:{store.port}"
    return StoreRendezvous(place, machines, timeout, first=first).next_rendezvous()


def test_the_machine_with_the_supervisor_is_number_0_whoever_comes_first(store):
    found = {}

    def join():
        found["other"] = meet(store, 2, first=False)

    other = threading.Thread(target=join)
    other.start()
    found["first"] = meet(store, 2, first=True)
    other.join(60)
    assert [found[name].rank for name in ("first", "other")] == [0, 1]
    assert {info.world_size for info in found.values()} == {2}


def test_a_machine_too_many_is_refused(store):
    store.add("agents/machines", 1)
    with pytest.raises(LinkError, match="all 2 machines"):
        meet(store, 2, first=False)


def test_machines_that_do_not_come_are_told_in_time(store):
    with pytest.raises(LinkError, match="not all 2 machines"):
        meet(store, 2, first=True, timeout=0.2)


def test_a_first_machine_that_is_not_there_is_told():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(LinkError, match="cannot reach"):
            StoreRendezvous(place, 2, 1.0, first=True).next_rendezvous()


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def test_a_pickle_that_a_peer_puts_into_the_store_is_not_executed(store, tmp_path):
    planted = base64.b64encode(pickle.dumps(Payload(tmp_path / "executed")))
    for key in ("torch.rendezvous.rlhf-tui", "/torch.rendezvous.rlhf-tui", "agents/machine/1"):
        store.set(key, planted)
    info = meet(store, 2, first=True)
    assert info.rank == 0
    assert not (tmp_path / "executed").exists()
