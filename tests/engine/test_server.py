"""The supervisor's socket at the end of a run."""

import asyncio
import logging

from engine.protocol import frames, sockets
from engine.protocol.client_messages import ClientHello
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
