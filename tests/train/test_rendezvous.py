"""The rendezvous of the agents and the ranks of several machines, in the authenticated store."""

import base64
import contextlib
import os
import pickle
import socket
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from engine.config.sections.launch import LaunchConfig
from engine.errors import AuthenticationError, LinkError, UserInputError
from engine.launch.environment import JOINED_VARIABLE, STORE_VARIABLE
from engine.launch.secret import SECRET_VARIABLE
from engine.launch.store_server import StoreServer
from engine.protocol.machines.store_messages import AddToKey, CheckKeys, SetKeys
from engine.protocol.rank_messages import STARTED_KEY
from engine.train.distributed.rank_store import RankStore
from engine.train.torchrun import agent
from engine.train.torchrun.rendezvous import StoreRendezvous

SECRET = "a secret of one run"  # noqa: S105 - of a test
MINUTE = timedelta(seconds=60)


@pytest.fixture
def server():
    """The first machine's store."""
    with contextlib.closing(StoreServer("127.0.0.1:0", SECRET.encode())) as serving:
        yield serving


def address_of(server):
    return f"127.0.0.1:{server.port}"


def rendezvous(server, machines, *, first, timeout=60.0):
    address = address_of(server)
    found = StoreRendezvous(address, machines, timeout, first=first, secret=SECRET)
    return found, found.next_rendezvous()


def in_threads(*functions):
    """Calls functions at the same time; returns their results."""
    results = [None] * len(functions)

    def call(number, function):
        results[number] = function()

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_the_machine_with_the_supervisor_is_number_0_whichever_machine_arrives_first(server):
    other, first = in_threads(
        lambda: rendezvous(server, 2, first=False), lambda: rendezvous(server, 2, first=True)
    )
    assert [info.rank for _, info in (first, other)] == [0, 1]
    assert {info.world_size for _, info in (first, other)} == {2}


def test_one_machine_too_many_is_refused(server):
    server.values.handle(AddToKey(key="agents/machines", amount=1))
    with pytest.raises(LinkError, match="all 2 machines"):
        rendezvous(server, 2, first=False)


def test_missing_machines_are_reported_after_the_timeout(server):
    with pytest.raises(LinkError, match="not all 2 machines"):
        rendezvous(server, 2, first=True, timeout=0.2)


def test_a_run_starts_with_fewer_machines_and_takes_no_more_until_its_next_start(server):
    address, key = address_of(server), {"secret": SECRET, "fewest": 2}

    def first():
        return StoreRendezvous(address, 3, 60.0, first=True, join_wait=0.2, **key).next_rendezvous()

    def other():
        return StoreRendezvous(address, 3, 60.0, first=False, **key).next_rendezvous()

    infos = in_threads(first, other)
    assert [(info.rank, info.world_size) for info in infos] == [(0, 2), (1, 2)]
    with pytest.raises(LinkError, match="it has started"):
        other()
    assert server.values.handle(CheckKeys(keys=[STARTED_KEY])).number


def test_an_unreachable_first_machine_is_reported(monkeypatch):
    monkeypatch.setattr("engine.train.distributed.rank_store.CONNECT_TIMEOUT", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(LinkError, match="cannot reach"):
            StoreRendezvous(address, 2, 1.0, first=True, secret=SECRET).next_rendezvous()


def test_a_machine_with_another_secret_is_refused(server):
    other = StoreRendezvous(address_of(server), 2, 1.0, first=False, secret="x" * 16)
    with pytest.raises(AuthenticationError):
        other.next_rendezvous()


def test_a_port_that_is_in_use_on_the_first_machine_is_named_with_its_key(
    server, tmp_path, monkeypatch
):
    monkeypatch.setenv(STORE_VARIABLE, f"tcp:{address_of(server)}")
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    monkeypatch.delenv(JOINED_VARIABLE, raising=False)
    serving = agent.serve_store(LaunchConfig(nodes=2), str(tmp_path), 1)
    with pytest.raises(UserInputError, match=r"launch\.rendezvous: cannot listen on port"), serving:
        pass


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def test_a_pickle_in_the_store_is_not_executed(server, tmp_path):
    planted = base64.b64encode(pickle.dumps(Payload(tmp_path / "executed")))
    names = ("torch.rendezvous.rlhf-tui", "/torch.rendezvous.rlhf-tui", "agents/machine/1")
    server.values.handle(SetKeys(values=dict.fromkeys(names, planted)))
    _, info = rendezvous(server, 2, first=True)
    assert info.rank == 0
    assert not (tmp_path / "executed").exists()


# -- torch's interface -----------------------------------------------------------------------------


@pytest.fixture
def store(server):
    return RankStore(address_of(server), SECRET, timedelta(seconds=0.2))


def test_torch_uses_the_store_like_one_of_its_own(store):
    prefixed = dist.PrefixStore("p", store)  # calls it from C++
    prefixed.set("text", "é")
    prefixed.set("bytes", b"\0\xff")
    assert prefixed.multi_get(["text", "bytes"]) == ["é".encode(), b"\0\xff"]
    assert (prefixed.get("text"), store.get("p/bytes")) == ("é".encode(), b"\0\xff")
    assert (prefixed.add("n", 3), prefixed.add("n", -1)) == (3, 2)
    assert (prefixed.check(["n"]), prefixed.check(["n", "m"])) == (True, False)
    assert prefixed.compare_set("n", "2", "5") == b"5"
    assert prefixed.delete_key("n")
    assert prefixed.num_keys() == 2
    prefixed.wait(["text"], timedelta(seconds=1))


def test_a_missing_key_and_a_lost_machine_are_torch_s_errors(server, store):
    with pytest.raises(dist.DistStoreError):
        dist.PrefixStore("p", store).get("missing")
    with pytest.raises(dist.DistStoreError):
        store.wait(["missing"], timedelta(seconds=0.1))
    server.close()
    with pytest.raises(dist.DistNetworkError, match="lost the connection"):
        store.add("n", 1)


def test_a_process_group_of_gloo_meets_in_the_store(server):
    def summed(rank):
        store = RankStore(address_of(server), SECRET, MINUTE)
        group = dist.ProcessGroupGloo(dist.PrefixStore("g", store), rank, 2, MINUTE)
        value = torch.tensor([rank + 1])
        group.allreduce([value]).wait()
        return int(value), store

    results = in_threads(lambda: summed(0), lambda: summed(1))
    assert [value for value, _ in results] == [3, 3]
