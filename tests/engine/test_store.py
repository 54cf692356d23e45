"""The store of a run over several machines, and who may use it."""

import contextlib
import os
import socket
import threading
import time

import pytest

from engine.errors import AuthenticationError, LinkError
from engine.launch.store_server import MAX_HANDSHAKES, StoreServer
from engine.protocol.machines.authentication import MAGIC
from engine.protocol.machines.store_client import StoreClient
from engine.protocol.machines.store_messages import (
    AddToKey,
    AppendToKey,
    CheckKeys,
    CompareAndSetKey,
    CountKeys,
    DeleteKey,
    GetKeys,
    SetKeys,
)

SECRET = b"a secret of one run"
DEADLINE = 60.0


@pytest.fixture
def server():
    with contextlib.closing(StoreServer("127.0.0.1:0", SECRET)) as serving:
        yield serving


def client_of(port, secret=SECRET):
    return StoreClient(f"127.0.0.1:{port}", secret, patience=0.0)


@pytest.fixture
def client(server):
    return client_of(server.port)


def raw(port):
    """A connection that can send whatever it likes."""
    sock = socket.create_connection(("127.0.0.1", port), DEADLINE)
    sock.settimeout(DEADLINE)
    return sock


def until_closed(sock):
    """All that the other side sends before it closes the connection."""
    received = b""
    with sock, contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(4096):
            received += chunk
    return received


def keys(server):
    return server.values.handle(CountKeys()).number


class Between:
    """Somebody between the client and the server who sees and may change what they send."""

    def __init__(self, port):
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.sent = b""
        """By the client."""
        self.change = lambda data: data
        """Applied to what the client sends."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        client, _ = self._listener.accept()
        server = raw(self._port)
        threading.Thread(target=self._pass_on, args=(server, client), daemon=True).start()
        with contextlib.suppress(OSError):  # either of them has gone already
            while data := client.recv(65536):
                self.sent += data
                server.sendall(self.change(data))
            server.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _pass_on(server, client):
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.close()


@pytest.fixture
def between(server):
    with contextlib.closing(Between(server.port)) as somebody:
        yield somebody


# -- who may use it --------------------------------------------------------------------------------


def test_a_client_with_another_secret_is_refused_and_changes_nothing(server):
    with pytest.raises(AuthenticationError, match="another secret"):
        client_of(server.port, b"a secret of another run")
    assert keys(server) == 0


def test_a_client_that_skips_its_proof_is_refused(server):
    sock = raw(server.port)
    sock.sendall(MAGIC + os.urandom(32))
    sock.recv(len(MAGIC) + 64)
    sock.sendall(b"\0" * 32 + b"\0\0\0\x08something")
    until_closed(sock)
    assert keys(server) == 0


def test_a_client_does_not_believe_a_server_that_repeats_its_challenge():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def repeat():
            sock, _ = listener.accept()
            hello = sock.recv(len(MAGIC) + 32)
            sock.sendall(hello + hello[len(MAGIC) :])
            until_closed(sock)

        threading.Thread(target=repeat, daemon=True).start()
        with pytest.raises(AuthenticationError):
            client_of(port)


def test_what_is_no_client_is_closed_without_a_reply(server):
    for words in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(200), b"\0" * 80):
        sock = raw(server.port)
        sock.sendall(words)
        assert until_closed(sock) == b""


def test_what_is_no_server_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def chat():
            sock, _ = listener.accept()
            sock.sendall(b"SSH-2.0-something else")
            until_closed(sock)

        threading.Thread(target=chat, daemon=True).start()
        with pytest.raises(LinkError, match="no run of this version"):
            client_of(port)


def test_a_recorded_connection_cannot_be_sent_again(server, between):
    client_of(between.port).request(AddToKey(key="machines", amount=1))
    again = raw(server.port)
    again.sendall(between.sent)
    until_closed(again)
    assert server.values.handle(AddToKey(key="machines", amount=0)).number == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data[:-1] + bytes([data[-1] ^ 1]), id="changed"),
        pytest.param(lambda data: data + data, id="repeated"),
    ],
)
def test_a_request_that_somebody_changed_or_repeated_on_the_way_is_refused(server, between, change):
    client = client_of(between.port)
    client.request(AddToKey(key="n", amount=1))
    between.change = change
    with pytest.raises(LinkError):
        for _ in range(2):
            client.request(AddToKey(key="n", amount=1))
    assert server.values.handle(AddToKey(key="n", amount=0)).number <= 2


def test_clients_that_never_prove_themselves_do_not_keep_others_out_for_long(server, monkeypatch):
    monkeypatch.setattr("engine.protocol.machines.authentication.HANDSHAKE_TIMEOUT", 0.2)
    idle = [raw(server.port) for _ in range(MAX_HANDSHAKES + 10)]
    client = StoreClient(f"127.0.0.1:{server.port}", SECRET, patience=DEADLINE)
    assert client.is_alive("x") is False  # it answers: there is no such key
    assert client.request(CountKeys()).number == 0
    for sock in idle:
        sock.close()


# -- keys and values -------------------------------------------------------------------------------


def test_a_client_for_which_no_thread_can_be_started_does_not_keep_later_ones_out(
    server, monkeypatch
):
    start, refused = threading.Thread.start, []

    def refuse_once(thread):
        if thread.daemon and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    with raw(server.port) as sock:
        until_closed(sock)
    assert refused
    assert client_of(server.port).is_alive("start") is False


def test_values_are_set_added_to_appended_compared_and_deleted(client):
    client.request(SetKeys(values={"a": b"\0\xff", "b": b""}))
    assert client.request(GetKeys(keys=["b", "a"], seconds=0)).values == [b"", b"\0\xff"]
    assert client.request(CheckKeys(keys=["a", "b"])).number == 1
    assert client.request(CheckKeys(keys=["a", "c"])).number == 0
    assert [client.request(AddToKey(key="n", amount=k)).number for k in (2, 0, -3)] == [2, 2, -1]
    client.request(AppendToKey(key="a", value=b"!"))
    assert client.request(GetKeys(keys=["a", "n"], seconds=0)).values == [b"\0\xff!", b"-1"]
    assert [client.request(DeleteKey(key="b")).number for _ in range(2)] == [1, 0]
    assert client.request(CountKeys()).number == 2


@pytest.mark.parametrize(
    ("before", "expected", "found"),
    [(None, b"", b"new"), (None, b"old", b"old"), (b"old", b"old", b"new"), (b"x", b"old", b"x")],
)
def test_a_value_is_set_only_if_it_is_the_expected_one(client, before, expected, found):
    if before is not None:
        client.request(SetKeys(values={"k": before}))
    request = CompareAndSetKey(key="k", expected=expected, desired=b"new")
    assert client.request(request).values == [found]


def test_a_number_is_not_added_to_text(client):
    client.request(SetKeys(values={"k": b"text"}))
    with pytest.raises(LinkError, match="not a number"):
        client.request(AddToKey(key="k", amount=1))


def test_a_client_waits_for_keys_that_others_set(server, client):
    def set_both():
        other = client_of(server.port)
        for key in ("b", "a"):
            other.request(SetKeys(values={key: key.encode()}))

    others = threading.Timer(0.1, set_both)
    others.start()
    assert client.wait(["a", "b"], DEADLINE, values=True).values == [b"a", b"b"]
    others.join(DEADLINE)  # its last reply may still be on its way


def test_a_key_that_does_not_appear_in_time_is_named(client):
    client.request(SetKeys(values={"a": b""}))
    assert client.wait(["a", "b"], 0.05).missing == "b"


def test_threads_do_not_wait_for_each_other(client):
    waiting = threading.Thread(target=client.wait, args=(["late"], DEADLINE))
    waiting.start()
    client.request(SetKeys(values={"late": b""}))
    waiting.join(DEADLINE)
    assert not waiting.is_alive()


def test_a_client_does_not_go_on_with_the_store_of_another_start():
    first = StoreServer("127.0.0.1:0", SECRET)
    client = client_of(first.port)
    client.request(SetKeys(values={"start": b"1"}))
    first.close()
    deadline = time.monotonic() + DEADLINE
    while True:  # the port may be in use for a moment
        try:
            second = StoreServer(f"127.0.0.1:{first.port}", SECRET)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with contextlib.closing(second):
        second.values.handle(SetKeys(values={"start": b"2"}))
        assert not client.is_alive("start")
        assert client_of(second.port).is_alive("start")


# -- where it listens ------------------------------------------------------------------------------


def test_only_the_interface_of_an_ip_address_listens(server):
    with pytest.raises(LinkError, match="cannot reach"):
        StoreClient(f"127.0.0.2:{server.port}", SECRET, patience=0.0)


def test_a_name_and_an_address_that_is_not_of_this_machine_listen_everywhere():
    for host in ("localhost", "192.0.2.1"):  # the second is of no machine (RFC 5737)
        with contextlib.closing(StoreServer(f"{host}:0", SECRET)) as server:
            assert StoreClient(f"127.0.0.2:{server.port}", SECRET, patience=0.0)
