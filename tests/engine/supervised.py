"""A supervisor without rank processes, and waits for what it does."""

import asyncio

from engine.launch.start_options import StartOptions
from engine.monitoring.guardrails import Alert
from engine.protocol import rank_messages
from engine.protocol.client import new_id
from engine.protocol.client_messages import CommandRequest
from engine.protocol.rank_messages import Applied, RankHello
from engine.supervisor.server import receive
from engine.supervisor.supervisor import Supervisor


class Engine:
    """A supervisor whose session is in the state `running`."""

    def __init__(self, writer):
        session = writer.session
        socket = session.folder / "engine.sock"
        self.supervisor = Supervisor(
            session, session.config(), writer.journal, socket, StartOptions()
        )
        self.shared = self.supervisor.state
        self.shared.next = None
        self.supervisor.publisher.set_state("starting")
        self.supervisor.publisher.set_state("running")

    def send(self, command):
        return self.supervisor.commands.handle(CommandRequest(id=new_id(), command=command), "me")

    def receive(self, message):
        self.supervisor.rank_messages.handle(message)

    def alert(self, action):
        for part in self.supervisor.commands.on_alert(Alert("much", action, "too much", 3)):
            part()

    @property
    def state(self):
        return self.supervisor.publisher.state


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)


async def starting_attempt(engine, start):
    """The task of an attempt whose rank's process is being started."""
    attempt = asyncio.create_task(engine.supervisor.run_attempt(start))
    async with asyncio.timeout(60):
        while not engine.supervisor.ranks.token:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0)
    return attempt


def apply_pending(engine):
    for message in engine.supervisor.pending.messages():
        engine.receive(Applied(id=message.id, step=4))


async def rank_connection(engine, folder):
    """A connection as of rank 0: its reader and writer, and a server to close."""
    engine.supervisor.ranks.token = "token"  # noqa: S105 - of a test
    path, served = str(folder / "link.sock"), engine.supervisor.rank_messages.handle_connection
    hello = RankHello(token="token", rank=0)  # noqa: S106 - of a test

    async def serve(reader, writer):
        try:
            await served(hello, reader, writer)
        finally:
            writer.close()  # since Python 3.12 the end of `async with server` waits for it

    server = await asyncio.start_unix_server(serve, path)
    return server, *await asyncio.open_unix_connection(path)


async def begin_of(engine, folder):
    """What a rank is sent when it connects."""
    server, reader, to_engine = await rank_connection(engine, folder)
    async with server:
        begin = rank_messages.decode_to_rank(await receive(reader))
        to_engine.close()
        return begin
