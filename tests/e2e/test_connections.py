"""No connection disturbs the engine, and an idle supervisor uses few resources."""

import json
import os
import socket
import time

import pytest

from engine.protocol import frames, sockets
from engine.protocol.client_messages import ClientHello, CommandRequest, StatusRequest, Watch
from engine.protocol.commands import SetSetting
from engine.protocol.rank_messages import RankHello
from tests.waiting import until


def connect(run):
    return sockets.connect(run.session.folder / "engine.sock", 10)


def after_hello(run):
    """A connection that has completed the hello."""
    sock = connect(run)
    sock.sendall(frames.encode(ClientHello(who="a test")))
    read_frame(sock)
    return sock


def read_frame(sock):
    header = read_exactly(sock, 4)
    return read_exactly(sock, frames.frame_length(header))


def read_exactly(sock, count):
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("hung up")
        data += piece
    return data


def frame(body):
    return frames.HEADER.pack(len(body)) + body


def is_closed_by_engine(sock):
    """Reads until the engine closes the connection; a timeout means that it did not."""
    sock.settimeout(60)
    try:
        while sock.recv(65536):
            continue
    except ConnectionError:
        return True
    return True


REQUEST = frames.encode(CommandRequest(id="x", command=SetSetting(key="beta", value=0)))[4:]
assert REQUEST.endswith(b"\x00")
INVALID_START = {
    "nothing": b"",
    "no header": b"\x00\x00",
    "random bytes": frame(os.urandom(200)),
    "text": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "oversized": frames.HEADER.pack(200 * 1024 * 1024) + b"x" * 1000,
    "over a client's limit": frames.HEADER.pack(300 * 1024) + b"x" * 1000,
    "half a frame": frames.HEADER.pack(1000) + b"x" * 10,
    "empty frame": frame(b""),
    "no hello": frames.encode(StatusRequest()),
    "a rank without the token": frames.encode(RankHello(token="guess", rank=0)),  # noqa: S106
    "deep": frame(b"\x91" * 100_000),
}


@pytest.mark.parametrize("data", INVALID_START.values(), ids=INVALID_START)
def test_a_connection_with_an_invalid_start_is_closed(training, data):
    with connect(training) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert is_closed_by_engine(sock)


AFTER_HELLO = {
    "oversized": frames.HEADER.pack(300 * 1024),
    "a second hello": frames.encode(ClientHello(who="again")),
    "not a message": frame(b"\xff\xff"),
    "a value a thousand lists deep": frame(REQUEST[:-1] + b"\x91" * 100_000 + b"\x00"),
    "an extension type": frame(REQUEST[:-1] + b"\xd4\x05\x00"),
    "a list for a key": frame(REQUEST[:-1] + b"\x81\x92\x01\x02\x03"),
}


@pytest.mark.parametrize("data", AFTER_HELLO.values(), ids=AFTER_HELLO)
def test_a_client_that_sends_an_invalid_message_is_disconnected(training, data):
    with after_hello(training) as sock:
        sock.sendall(data)
        assert is_closed_by_engine(sock)


def test_a_silent_connection_is_closed_after_a_while(training):
    with connect(training) as sock:
        assert is_closed_by_engine(sock)


def test_a_client_that_stops_within_a_frame_is_closed_after_a_while(training):
    with after_hello(training) as sock:
        sock.sendall(frames.HEADER.pack(1000) + b"x" * 10)
        assert is_closed_by_engine(sock)


def test_abandoned_connections_do_not_accumulate(training):
    for _ in range(200):
        with after_hello(training) as sock:
            sock.sendall(frames.encode(StatusRequest()))
    with training.client() as client:
        assert client.status().state == "running"


def test_a_client_that_never_reads_is_disconnected(training):
    with after_hello(training) as sock:
        sock.sendall(frames.encode(Watch()))
        request = frames.encode(StatusRequest())
        with pytest.raises((ConnectionError, TimeoutError)):
            while True:
                sock.sendall(request)
    with training.client() as client:
        assert client.status().state == "running"


def test_a_command_sent_by_a_client_that_hangs_up_is_carried_out(training):
    with after_hello(training) as sock:
        sock.sendall(
            frames.encode(
                CommandRequest(id="and-gone", command=SetSetting(key="save_every", value=0))
            )
        )
    done = ("applied",)
    until(lambda: training.commands().get("and-gone", {}).get("status") in done, "the command")


def test_a_paused_supervisor_uses_almost_no_resources(endless):
    engine = endless.engine()
    before, began = engine.cpu_times(), time.monotonic()
    # The measured interval; it does not wait for a condition.
    time.sleep(6)
    after, span = engine.cpu_times(), time.monotonic() - began
    share = (after.user + after.system - before.user - before.system) / span
    memory = engine.memory_info().rss / 1e6
    print(f"idle: {share:.2%} of a core, {memory:.1f} MB resident")  # noqa: T201
    assert share < 0.01
    assert memory < 60


def test_telemetry_contains_the_rank(endless):
    def latest():
        with endless.client() as client:
            return client.status().telemetry.ranks

    (load,) = until(latest, "telemetry of the rank")
    assert load.pid == endless.rank().pid
    assert load.memory > 0


def test_the_engines_log_says_why_connections_were_closed(training):
    with connect(training) as sock:
        sock.sendall(frame(b"\xff\xff"))
        assert is_closed_by_engine(sock)
    lines = json.loads(training.lab.cli("logs", training.name, "--json").stdout)
    assert any("not a first message of protocol" in line for line in lines)
