"""Commands whose connection ends early: the engine ends, or the connection gives way to others."""

import asyncio
import contextlib
import os
import socket
import threading

import pytest
from click.testing import CliRunner

from engine.errors import LinkError
from engine.journal.last_reply import last_reply
from engine.protocol import frames, sockets
from engine.protocol.client import Client
from engine.protocol.client_messages import (
    ClientHello,
    CommandReply,
    CommandRequest,
    Status,
    StatusRequest,
    Welcome,
    decode_from_client,
)
from engine.protocol.commands import Pause, Stop
from engine.supervisor import server as server_module
from rlhf_tui.cli import cli
from tests.engine.supervised import apply_pending, until

DEADLINE = 60.0

STATUS = Status(
    state="paused", step=3, total_steps=9, attempt=1, settings={}, phases=[],
    boundary_in=None, telemetry=None, watchers=0, pid=os.getpid(),
)  # fmt: skip


def end_after_a_command(listener):
    """An engine that accepts a command and is gone, as of a run that cannot save."""
    sock, _ = listener.accept()
    with sock:
        while True:
            match decode_from_client(frames.receive(sock)):
                case ClientHello():
                    reply = Welcome(pid=os.getpid())
                case StatusRequest():
                    reply = STATUS
                case CommandRequest(id=command_id):
                    accepted = CommandReply(id=command_id, status="accepted", reason="disk full")
                    sock.sendall(frames.encode(accepted))
                    return
            sock.sendall(frames.encode(reply))


@pytest.fixture
def live(writer):
    """The session, locked as by an engine."""
    lock = writer.session.acquire()
    yield writer.session
    lock.release()


@pytest.fixture
def ctl(live):
    """Runs `ctl` on the session; whoever listens must serve it."""
    session = live

    def run(*verb):
        return CliRunner().invoke(
            cli, ["ctl", session.name, *map(str, verb), "--sessions", str(session.folder.parent)]
        )

    return run


@contextlib.contextmanager
def ending_engine(live):
    """An engine that ends after a command."""
    listener, path = sockets.listen(live.folder)
    live.write_engine(str(path), "1")
    engine = threading.Thread(target=end_after_a_command, args=(listener,))
    engine.start()
    yield
    engine.join()
    listener.close()


def test_an_engine_is_reached_though_its_machine_has_another_name_by_now(ctl, live, monkeypatch):
    with ending_engine(live):
        monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
        done = ctl("stop")
    assert done.exit_code == 0, done.output
    assert "runs on" in str(ctl("stop").exception)


def test_a_stop_that_ends_the_engine_at_once_is_accepted_all_the_same(ctl, live):
    with ending_engine(live):
        done = ctl("stop")
    assert done.exit_code == 0, done.output
    assert "disk full" in done.stderr
    assert done.stdout.startswith("accepted")


@pytest.fixture
async def crowded(engine, live, monkeypatch):
    """A supervisor that keeps one connection; one more makes it give way."""
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 1)
    monkeypatch.setattr(server_module, "FRESH_SECONDS", 0.0)
    listener, path = sockets.listen(live.folder)
    live.write_engine(str(path), "1")
    parts = engine.supervisor
    served = parts.rank_messages.handle_connection
    await parts.server.start(listener, parts.commands, parts, served)
    yield engine
    parts.server.close()


async def test_a_wait_ends_with_its_command_although_its_connection_gave_way(ctl, crowded, live):
    waiting = asyncio.create_task(asyncio.to_thread(ctl, "pause", "--wait", "--timeout", DEADLINE))
    await until(crowded.supervisor.pending.messages)
    with await asyncio.to_thread(Client, live, "another"):
        apply_pending(crowded)
    done = await waiting
    assert done.exit_code == 0, done.output
    assert done.stdout == "applied at step 4: paused after step 3\n"


@pytest.mark.parametrize("seconds", [0.7, 0])
async def test_a_wait_without_a_connection_has_its_time_limit(ctl, crowded, live, seconds):
    waiting = asyncio.create_task(asyncio.to_thread(ctl, "pause", "--wait", "--timeout", seconds))
    await until(crowded.supervisor.pending.messages)
    with await asyncio.to_thread(Client, live, "another"):
        done = await waiting
    assert done.exit_code == 4
    assert "still pending" in done.stderr


async def test_a_command_is_sent_again_once_if_its_connection_gave_way(crowded, live):
    with await asyncio.to_thread(Client, live, "me") as client:
        with await asyncio.to_thread(Client, live, "another"):
            reply = await asyncio.to_thread(client.send, Pause())
        assert reply.status == "accepted"
        assert len(crowded.supervisor.pending.messages()) == 1


async def test_a_wait_for_an_engine_that_ends_without_a_word_says_so(crowded, live, writer):
    with await asyncio.to_thread(Client, live, "me") as client:
        reply = await asyncio.to_thread(client.send, Pause())
        with await asyncio.to_thread(Client, live, "another"):
            waiting = asyncio.create_task(
                asyncio.to_thread(last_reply, client, live, Pause(), reply.id, None)
            )
            live.lock_file.unlink()  # as if the lock's holder were gone
        with pytest.raises(LinkError, match="has ended, and its journal does not say"):
            await waiting


async def test_a_stop_that_no_journal_could_take_is_carried_out_once_its_engine_has_ended(
    crowded, live, writer
):
    writer.steps(1, 2, 3)
    writer.checkpoint(2)
    with await asyncio.to_thread(Client, live, "me") as client:
        await asyncio.to_thread(client.send, Pause())
        with await asyncio.to_thread(Client, live, "another"):
            given = (client, live, Stop(), "of a stop on a full disk", None)
            waiting = asyncio.create_task(asyncio.to_thread(last_reply, *given))
            live.lock_file.unlink()  # as if the lock's holder were gone
        last = await waiting
    assert (last.status, last.step) == ("applied", 4)
    assert last.reason.endswith("step 3 is not saved, a resume continues from step 2")
