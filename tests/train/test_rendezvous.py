"""The rendezvous of the agents of several machines."""

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
    """The first machine's store."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def rendezvous(store, machines, *, first, timeout=60.0):
    address = f"127.0.0.1:{store.port}"
    return StoreRendezvous(address, machines, timeout, first=first).next_rendezvous()


def test_the_machine_with_the_supervisor_is_number_0_whichever_machine_arrives_first(store):
    found = {}

    def join():
        found["other"] = rendezvous(store, 2, first=False)

    other = threading.Thread(target=join)
    other.start()
    found["first"] = rendezvous(store, 2, first=True)
    other.join(60)
    assert [found[name].rank for name in ("first", "other")] == [0, 1]
    assert {info.world_size for info in found.values()} == {2}


def test_one_machine_too_many_is_refused(store):
    store.add("agents/machines", 1)
    with pytest.raises(LinkError, match="all 2 machines"):
        rendezvous(store, 2, first=False)


def test_missing_machines_are_reported_after_the_timeout(store):
    with pytest.raises(LinkError, match="not all 2 machines"):
        rendezvous(store, 2, first=True, timeout=0.2)


def test_an_unreachable_first_machine_is_reported():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(LinkError, match="cannot reach"):
            StoreRendezvous(address, 2, 1.0, first=True).next_rendezvous()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def test_a_pickle_that_a_peer_puts_into_the_store_is_not_executed(store, tmp_path):
    planted = base64.b64encode(pickle.dumps(Payload(tmp_path / "executed")))
    for key in ("torch.rendezvous.rlhf-tui", "/torch.rendezvous.rlhf-tui", "agents/machine/1"):
        store.set(key, planted)
    info = rendezvous(store, 2, first=True)
    assert info.rank == 0
    assert not (tmp_path / "executed").exists()
