"""The supervisor's socket: malformed frames, too many clients, the end of a run."""

import asyncio
import contextlib
import logging
import os
import resource
import socket

import msgspec
import pytest

from engine.errors import LinkError, RefusedByEngineError
from engine.protocol import frames, sockets
from engine.protocol.client import Client
from engine.protocol.client_messages import (
    ClientHello,
    CommandReply,
    CommandRequest,
    JournalAdvanced,
)
from engine.protocol.commands import Pause, SetSetting, Stop
from engine.supervisor import server as server_module
from engine.supervisor.server import Server
from tests.engine.supervised import until

DEADLINE = 60.0
MORE_THAN_THE_KERNEL_HOLDS = 6000
"""Replies to a client that does not read; fewer than close its connection by themselves."""


def test_an_end_with_a_client_attached_logs_no_error(tmp_path, caplog):
    async def serve():
        listener, path = sockets.listen(tmp_path)
        server = Server()
        await server.start(listener, None, None, None)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(frames.encode(ClientHello(who="me")))
        assert await asyncio.wait_for(reader.read(1), DEADLINE), "the client is admitted"
        server.close()

    with caplog.at_level(logging.INFO):
        asyncio.run(serve())
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO] == []


MALFORMED = {
    "an extension": msgspec.msgpack.encode(msgspec.msgpack.Ext(5, b"x")),
    "a text that is no UTF-8": b"\xa2\xff\xfe",
    "a key that is a list": b"\x81\x91\x01\x02",
    "a key that is nothing": b"\x81\xc0\x02",
}
"""Values of a setting in MessagePack that the journal cannot hold."""


def request_with(value):
    """The frame of a `set` command with a value that is encoded already."""
    placeholder = msgspec.msgpack.encode("placeholder")
    command = SetSetting(key="beta", value="placeholder")
    frame = frames.encode(CommandRequest(id="a", command=command))
    body = frame[frames.HEADER.size :].replace(placeholder, value)
    return frames.HEADER.pack(len(body)) + body


def test_a_malformed_frame_closes_its_connection_and_logs_no_traceback(tmp_path, caplog):
    async def serve():
        listener, path = sockets.listen(tmp_path)
        server = Server()
        await server.start(listener, None, None, None)
        bad = [request_with(value) for value in MALFORMED.values()]
        for first in (frames.encode(ClientHello(who="me")), bad[1]):
            for frame in bad:
                reader, writer = await asyncio.open_unix_connection(path)
                writer.write(first + frame)
                await asyncio.wait_for(reader.read(), DEADLINE)  # to the end of the connection
                writer.close()
        server.close()

    with caplog.at_level(logging.INFO):
        asyncio.run(serve())
    assert len(caplog.records) == 2 * len(MALFORMED)
    for record in caplog.records:
        assert record.getMessage().startswith("a connection was closed: not a ")
        assert record.exc_info is None


async def logged_while_no_file_can_be_opened(folder, caplog, lines):
    """What the server logs until it has logged so many lines and then accepts a client."""
    listener, path = sockets.listen(folder)
    server = Server()
    await server.start(listener, None, None, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as client:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            client.connect(str(path))
            await until(lambda: len(caplog.records) >= lines)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.sendall(frames.encode(ClientHello(who="me")))
        assert await asyncio.to_thread(client.recv, 1), "the client is admitted"
    server.close()
    return list(caplog.records)


async def test_that_no_connection_can_be_accepted_is_one_line_of_the_log(tmp_path, caplog):
    async with asyncio.timeout(DEADLINE):
        (record,) = await logged_while_no_file_can_be_opened(tmp_path, caplog, 1)
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("cannot accept connections: Too many open files; ")
    assert f"prlimit --pid {os.getpid()}" in record.getMessage()
    assert record.exc_info is None


async def test_that_line_is_repeated_after_an_interval(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(server_module, "ACCEPT_LOG_INTERVAL", 0.5)  # asyncio tries each second
    async with asyncio.timeout(DEADLINE):
        records = await logged_while_no_file_can_be_opened(tmp_path, caplog, 2)
    assert len({record.getMessage() for record in records}) == 1


async def test_other_errors_that_asyncio_catches_are_logged_with_their_traceback(tmp_path, caplog):
    listener, _ = sockets.listen(tmp_path)
    server = Server()
    await server.start(listener, None, None, None)
    asyncio.get_running_loop().call_soon(int, "no number")
    await until(lambda: caplog.records)
    server.close()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert isinstance(record.exc_info[1], ValueError)


class Requests:
    """Stops a run at once, and pauses it at a boundary that does not come."""

    handled = 0

    def handle(self, request, _who):
        self.handled += 1
        status = "applied" if isinstance(request.command, Stop) else "accepted"
        return CommandReply(id=request.id, status=status, step=1)

    def journal_position(self):
        return JournalAdvanced(step=1, event=1, state="running")


@pytest.fixture
def serving(make_session):
    """Runs a test with a server, and a function that connects a client to it."""
    session = make_session()

    def run(test):
        async def with_server():
            listener, path = sockets.listen(session.folder)
            session.write_engine(str(path), "1")
            server, requests = Server(), Requests()
            await server.start(listener, requests, requests, None)
            with contextlib.ExitStack() as stack:

                async def connect(who="me"):
                    return stack.enter_context(await asyncio.to_thread(Client, session, who))

                await test(server, connect)
            server.close()

        asyncio.run(with_server())

    lock = session.acquire()
    yield run
    lock.release()


def test_a_watcher_too_many_is_refused_with_the_reason_and_can_stop_the_run(serving, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_WATCHERS", 1)
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 1)
    monkeypatch.setattr(server_module, "FRESH_SECONDS", 0.0)

    async def test(_server, connect):
        watching = (await connect()).watch()
        assert await asyncio.to_thread(next, watching)
        late = await connect()
        with pytest.raises(RefusedByEngineError, match="1 viewers are connected already"):
            await asyncio.to_thread(next, late.watch())
        reply = await asyncio.to_thread((await connect()).send, Stop())
        assert reply.status == "applied"

    serving(test)


def test_an_engine_of_another_version_is_ended_by_its_process_id(serving, monkeypatch):
    async def test(_server, connect):
        monkeypatch.setattr(frames, "VERSION", frames.VERSION + 1)
        with pytest.raises(RefusedByEngineError, match=rf"end it by kill {os.getpid()}, which"):
            await connect()

    serving(test)


def test_a_command_takes_the_place_of_a_connection_that_waits_for_nothing(serving, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 2)
    monkeypatch.setattr(server_module, "FRESH_SECONDS", 0.0)

    async def test(server, connect):
        waiting, idle = await connect(), await connect()
        await asyncio.to_thread(waiting.send, Pause(), "a")
        reply = await asyncio.to_thread((await connect()).send, Stop())
        assert reply.status == "applied"
        with pytest.raises(LinkError, match="closed the connection"):
            await asyncio.to_thread(idle.wait, "b", DEADLINE)
        server.send_reply(CommandReply(id="a", status="applied", step=2))
        assert (await asyncio.to_thread(waiting.wait, "a", DEADLINE)).step == 2

    serving(test)


def test_many_commands_that_come_at_once_are_all_handled(serving, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 1)
    monkeypatch.setattr(server_module, "MAX_FRESH", 3)
    monkeypatch.setattr(server_module, "FRESH_SECONDS", DEADLINE)

    async def test(_server, connect):
        clients = [await connect() for _ in range(4)]
        for client in clients[1:]:
            assert (await asyncio.to_thread(client.send, Stop())).status == "applied"
        with pytest.raises(LinkError, match="closed the connection"):
            # One too many, however fresh.
            await asyncio.to_thread(clients[0].wait, "a", DEADLINE)

    serving(test)


def test_a_client_that_never_reads_is_gone_soon_after_its_connection_was_closed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 1)
    monkeypatch.setattr(server_module, "CLOSE_TIMEOUT", 0.1)
    monkeypatch.setattr(server_module, "FRESH_SECONDS", 0.0)
    hello, request = ClientHello(who="me"), CommandRequest(id="a", command=Stop())

    async def serve():
        listener, path = sockets.listen(tmp_path)
        server, requests = Server(), Requests()
        await server.start(listener, requests, requests, None)
        deaf = sockets.connect(path, DEADLINE)
        deaf.sendall(frames.encode(hello))
        async with asyncio.timeout(DEADLINE):
            await asyncio.to_thread(
                deaf.sendall, MORE_THAN_THE_KERNEL_HOLDS * frames.encode(request)
            )
            await until(lambda: requests.handled >= MORE_THAN_THE_KERNEL_HOLDS)
            _, other = await asyncio.open_unix_connection(path)
            other.write(frames.encode(hello))
            with contextlib.suppress(ConnectionError):
                while True:
                    await asyncio.to_thread(deaf.sendall, frames.encode(request))
                    await asyncio.sleep(0.01)
        deaf.close()
        other.close()
        server.close()

    asyncio.run(serve())
