"""What clients that watch are sent: states, merged, whatever their number and their pace."""

import asyncio

import pytest

from engine.protocol import frames, sockets
from engine.protocol.client_messages import (
    ClientHello,
    JournalAdvanced,
    Watch,
    Welcome,
    decode_to_client,
)
from engine.protocol.rank_messages import Phase
from engine.supervisor import watchers
from engine.supervisor.server import Server

DEADLINE = 60.0


class Journal:
    """What the server asks of the supervisor here: the newest rows of its journal."""

    step = 0

    def journal_position(self):
        return JournalAdvanced(step=self.step, event=2 * self.step, state="running")


class Watching:
    """A client that watches."""

    def __init__(self, reader):
        self._reader = reader

    async def read(self):
        async with asyncio.timeout(DEADLINE):
            length = frames.frame_length(await self._reader.readexactly(frames.HEADER.size))
            return decode_to_client(await self._reader.readexactly(length))

    async def read_to(self, last):
        """All messages up to one."""
        found = [await self.read()]
        while found[-1] != last:
            found.append(await self.read())
        return found


@pytest.fixture
def serving(tmp_path):
    """Runs a test with a server, its journal and a function that connects a client."""

    def run(test):
        async def with_server():
            listener, path = sockets.listen(tmp_path)
            server, journal = Server(), Journal()
            await server.start(listener, None, journal, None)
            writers = []

            async def connect():
                sock = sockets.connect(path)
                reader, writer = await asyncio.open_unix_connection(sock=sock, limit=4096)
                writers.append(writer)
                writer.write(frames.encode(ClientHello(who="me")) + frames.encode(Watch()))
                client = Watching(reader)
                assert isinstance(await client.read(), Welcome)
                assert await client.read() == journal.journal_position()
                return client

            try:
                await test(server, journal, connect)
            finally:
                server.close()
                for writer in writers:
                    writer.close()

        asyncio.run(with_server())

    return run


def phase(rank, done):
    return Phase(rank=rank, step=1, name="generate", done=done, total=1000)


def test_of_many_phases_each_watcher_gets_the_newest_of_each_rank(serving):
    async def test(server, journal, connect):
        clients = [await connect() for _ in range(3)]
        for done in range(1000):
            for rank in (0, 1):
                server.send_to_watchers(phase(rank, done))
        journal.step = 7
        server.notify_watchers(soon=False)
        for client in clients:
            assert await client.read_to(journal.journal_position()) == [
                phase(0, 999), phase(1, 999), journal.journal_position(),
            ]  # fmt: skip

    serving(test)


def test_a_watcher_that_stops_reading_gets_the_newest_state_when_it_reads_again(
    serving, monkeypatch
):
    monkeypatch.setattr(watchers, "FRAME_INTERVAL", 0.001)
    monkeypatch.setattr(watchers, "FRAMES_PER_SECOND", 1e6)

    async def test(server, journal, connect):
        stopped, reading = await connect(), await connect()
        long = 100 * "a phase with a long name "
        for done in range(500):
            sent = Phase(rank=0, step=1, name=long, done=done, total=500)
            server.send_to_watchers(sent)
            await reading.read_to(sent)
        journal.step = 7
        server.notify_watchers()
        await reading.read_to(journal.journal_position())
        found = await stopped.read_to(journal.journal_position())
        assert sent in found
        assert len(found) < 400, "what waits for a client does not grow"

    serving(test)


def test_steps_wait_where_many_watch_and_what_people_wait_for_does_not(serving, monkeypatch):
    monkeypatch.setattr(watchers, "FRAMES_PER_SECOND", 1e-6)
    monkeypatch.setattr(watchers, "MAX_DELAY", 2 * DEADLINE)

    async def test(server, journal, connect):
        client = await connect()
        server.send_to_watchers(phase(0, 1))
        server.notify_watchers()
        assert await client.read() == phase(0, 1)  # the first is not late
        assert await client.read() == journal.journal_position()
        journal.step = 1
        server.notify_watchers(soon=False)
        journal.step = 2
        server.notify_watchers()
        assert await client.read() == journal.journal_position()

    serving(test)


def test_the_end_of_a_run_does_not_wait(serving, monkeypatch):
    monkeypatch.setattr(watchers, "FRAME_INTERVAL", 2 * DEADLINE)

    async def test(server, journal, connect):
        client = await connect()
        journal.step = 7
        server.notify_watchers()
        server.close()
        assert await client.read() == journal.journal_position()

    serving(test)
