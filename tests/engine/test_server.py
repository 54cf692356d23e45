"""The supervisor's socket at the end of a run."""

import asyncio
import logging

import msgspec
import pytest

from engine.errors import LinkError
from engine.protocol import frames, sockets
from engine.protocol.client import Client
from engine.protocol.client_messages import ClientHello, CommandRequest
from engine.protocol.commands import SetSetting
from engine.supervisor import server as server_module
from engine.supervisor.server import Server

DEADLINE = 60.0


def test_an_end_with_a_client_attached_logs_no_error(tmp_path, caplog):
    async def serve():
        listener, path = sockets.listen(tmp_path)
        server = Server()
        await server.start(listener, None, None)
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
        await server.start(listener, None, None)
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


def test_a_client_too_many_is_told_so(make_session, monkeypatch):
    session = make_session()
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 1)

    async def serve():
        listener, path = sockets.listen(session.folder)
        session.write_engine(str(path), "1")
        server = Server()
        await server.start(listener, None, None)
        first = await asyncio.to_thread(Client, session, "me")
        with pytest.raises(LinkError, match="1 clients are connected, its limit"):
            await asyncio.to_thread(Client, session, "me")
        first.close()
        server.close()

    lock = session.acquire()
    asyncio.run(serve())
    lock.release()
