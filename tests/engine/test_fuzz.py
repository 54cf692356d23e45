"""Anything that a socket, a journal or a checkpoint may hold: one clear error, and no hang.

`tests/data/fuzz` holds inputs that went wrong once, or that are as hostile as can be imagined; the
generated ones are new in each run of `make test-all`.
"""

import asyncio
import contextlib
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import JournalError, LinkError
from engine.journal.judgements.labels import LabelReader, Response, set_label
from engine.journal.reader import JournalReader
from engine.launch.start_options import StartOptions
from engine.protocol import frames, rank_messages, sockets
from engine.protocol.client_messages import (
    ClientHello,
    Status,
    StatusRequest,
    decode_from_client,
    decode_to_client,
)
from engine.session.checkpoints import find_damage, mark_complete, read_summary, saved_settings
from engine.supervisor.server import receive
from engine.supervisor.supervisor import Supervisor

CORPUS = Path(__file__).parents[1] / "data" / "fuzz"
DEADLINE = 60.0
fresh = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

keys = st.sampled_from(
    ["type", "id", "command", "key", "value", "who", "text", "step", "now", "request", "hello"]
)
packable = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary()
    | st.text(st.characters(codec="utf-8")) | keys,
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(keys | st.integers(-9, 9), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
commands = st.builds(
    lambda command, values: {
        "type": "request",
        "id": "x",
        "command": {"command": command} | values,
    },
    st.sampled_from(["set", "beta", "kl", "note", "probe", "rollback", "stop", "undo", "nothing"]),
    st.dictionaries(keys, packable, max_size=3),
)
bodies = st.binary(max_size=60) | packable.map(msgspec.msgpack.encode) | commands.map(
    msgspec.msgpack.encode
)  # fmt: skip


def corpus(kind):
    return sorted((CORPUS / kind).iterdir())


async def exchange(supervisor, folder, hostile):
    """Sends frames on connections of their own, after a hello and without; then asks for status."""
    listener, path = sockets.listen(folder)
    server = supervisor.server
    served = supervisor.rank_messages.handle_connection
    await server.start(listener, supervisor.commands, supervisor, served)
    hello = frames.encode(ClientHello(who="me"))
    try:
        async with asyncio.timeout(DEADLINE):
            for body in hostile:
                frame = frames.HEADER.pack(len(body)) + body
                for first in (b"", hello):
                    reader, writer = await asyncio.open_unix_connection(path)
                    writer.write(first + frame + frames.encode(StatusRequest()))
                    writer.write_eof()
                    with contextlib.suppress(ConnectionError):
                        await reader.read()
                    writer.close()
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(hello + frames.encode(StatusRequest()))
            await receive(reader)
            status = decode_to_client(await receive(reader))
            writer.close()
            return status
    finally:
        server.close()
        path.unlink(missing_ok=True)


def survives(writer, caplog, hostile):
    async def serve():
        session = writer.session
        start = StartOptions()
        supervisor = Supervisor(
            session, session.config(), writer.journal, session.folder / "sock", start
        )
        supervisor.publisher.set_state("starting")
        status = await exchange(supervisor, session.folder, hostile)
        await supervisor.commands.checkpoints.finish()
        return status

    with caplog.at_level(logging.INFO):
        status = asyncio.run(serve())
    assert isinstance(status, Status)
    assert not [r for r in caplog.records if r.exc_info or "Traceback" in r.getMessage()]


def test_a_supervisor_survives_the_recorded_frames(writer, caplog):
    survives(writer, caplog, [path.read_bytes() for path in corpus("frames")])


@pytest.mark.slow
@fresh
@given(st.lists(bodies, min_size=1, max_size=8))
def test_a_supervisor_survives_any_frames(writer, caplog, hostile):
    survives(writer, caplog, hostile)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(bodies)
def test_any_frame_on_a_link_is_a_message_or_a_link_error(body):
    for decode in (
        decode_from_client, decode_to_client, rank_messages.decode_from_rank,
        rank_messages.decode_to_rank,
    ):  # fmt: skip
        with contextlib.suppress(LinkError):
            decode(body)


# -- journals --------------------------------------------------------------------------------------

COLUMNS = {
    "journal": [
        ("meta", "value"), ("commands", "args"), ("commands", "changes"), ("commands", "result"),
        ("commands", "command"), ("events", "data"), ("events", "kind"),
    ],
    "samples": [("samples", "parts"), ("arrays", "data"), ("samples", "response")],
}  # fmt: skip
JSON = [
    "", "{", "null", "[]", "{}", "1", '"x"', "[[[]]]", '{"key": 1}', '[{"key": 1, "old": 1}]',
    '{"fork": 3}', '{"fork": {"from": 1}}', '{"id": []}', "NaN", "1e999", '"\\ud800"',
    "[" * 100_000, '{"a":' * 5000,
]  # fmt: skip


def read_everything(session):
    """Everything that readers offer."""
    with JournalReader(session) as reader, LabelReader(session) as labels:
        reader.meta()
        reader.state()
        [c.as_json() for c in reader.commands()]
        [e.as_json() for e in reader.events()]
        [m.as_json() for m in reader.metrics.rows()]
        reader.fork_origin()
        reader.last_reference_probe("x")
        [s.as_json() for s in reader.samples.newest()]
        reader.samples.arrays(1, 0, 1)
        labels.judgements()


@pytest.mark.parametrize("place", [(f, *c) for f, columns in COLUMNS.items() for c in columns])
def test_any_value_in_a_journal_is_read_or_is_a_journal_error(writer, place):
    file, table, column = place
    writer.steps(1)
    writer.change("c", 2, 0.1, 0.2)
    writer.order("p", "probe", text="x")
    writer.journal.commands.apply("p", 2, [], {"reference": {"response": "y"}})
    set_label(writer.session, "p", Response(response="r", attempt=1, step=1, index=0), "good", "me")
    for value in JSON:
        with closing(sqlite3.connect(writer.session.folder / f"{file}.db")) as db, db:
            db.execute(f"UPDATE {table} SET {column} = ?", (value,))  # noqa: S608 - constants
        with contextlib.suppress(JournalError):
            read_everything(writer.session)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", corpus("states"), ids=lambda path: path.name)
def test_a_recorded_state_is_read_or_reported_as_damaged(tmp_path, path):
    (tmp_path / "state.json").write_bytes(path.read_bytes())
    mark_complete(tmp_path)
    assert find_damage(tmp_path) is None or "\n" not in find_damage(tmp_path)
    read_summary(tmp_path)
    assert isinstance(saved_settings(tmp_path), dict)
