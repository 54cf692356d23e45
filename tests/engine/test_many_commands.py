"""What commands cost in a run that a script steers at every step, in instructions of SQLite."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from engine.config.settings import SettingChange
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.journal.history.recording import Recording
from engine.journal.history.views import journal_views, views_of
from engine.journal.logs.command_log import CommandLog
from engine.journal.logs.event_log import EventLog
from engine.journal.reader import JournalReader


def cost(db: sqlite3.Connection, action: Callable[[], object]) -> int:
    """The instructions that an action takes, in tens."""
    count = 0

    def instructions() -> int:
        nonlocal count
        count += 1
        return 0

    db.set_progress_handler(instructions, 10)
    action()
    db.set_progress_handler(None, 0)
    return count


def steer(log: CommandLog, number: int) -> None:
    """One command, carried out."""
    log.record(f"c{number}", "beta", {"value": 0.1}, "me")
    log.accept(f"c{number}")
    log.apply(f"c{number}", number, [SettingChange(key="beta", old=0.1, new=0.2)])


@contextmanager
def opened(session) -> Iterator[tuple[JournalReader, sqlite3.Connection]]:
    """A reader, and its connection."""
    views = views_of(session, journal_views)
    database = ReadOnlyDatabase(session.journal_file, schema.JOURNAL, views)
    with JournalReader(session, database) as reader:
        assert database.connection is not None
        yield reader, database.connection


def test_recording_a_command_costs_the_same_after_many(tmp_path):
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as db:
        schema.migrate(db, schema.JOURNAL, path)
        log = CommandLog(db, EventLog(db))
        costs = [cost(db, lambda number=number: steer(log, number)) for number in range(1, 301)]
    assert costs[-1] < 2 * costs[0]


def test_a_look_at_a_new_command_costs_the_same_after_many(writer):
    costs = []
    for number in range(1, 301):
        steer(writer.journal.commands, number)
        if number in (1, 300):
            with opened(writer.session) as (reader, db):
                costs.append(cost(db, lambda reader=reader: reader.events(last=1)))
    assert costs[1] < 2 * costs[0]


@pytest.mark.parametrize("read", [JournalReader.commands, JournalReader.meta, JournalReader.events])
def test_a_replay_of_twice_as_many_commands_costs_about_twice_as_much(writer, read):
    costs = []
    for number in range(1, 401):
        writer.steps(number)
        steer(writer.journal.commands, number + 1)
        if number in (200, 400):
            recording = Recording(writer.session)
            past = writer.session.at(recording.position_at(recording.duration))
            with opened(past) as (reader, db):
                costs.append(cost(db, lambda reader=reader: read(reader)))
    assert costs[1] < 3 * costs[0]
