"""Databases that somebody has made by hand: SQLite must not delete files or compute for them."""

import os
import sqlite3
import struct
from contextlib import closing

import pytest

from engine.errors import JournalError, SessionError
from engine.journal.judgements.labels import LabelReader, Response, set_label
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleReader
from engine.journal.writer import JournalWriter

ANSWER = Response(response="answer", attempt=1, step=1, index=0)
MAGIC = bytes.fromhex("d9d505f920a163d7")


def plant(database, victim):
    """A rollback journal beside a database, after whose roll back SQLite deletes a file."""
    with closing(sqlite3.connect(database)) as db:
        (size,), (count,) = (
            db.execute(f"PRAGMA {name}").fetchone() for name in ("page_size", "page_count")
        )
    name = str(victim).encode()
    header = (MAGIC + struct.pack(">5I", 0, 0, count, 512, size)).ljust(512, b"\0")
    pointer = struct.pack(">I", 0x40000000 // size + 1) + name
    end = struct.pack(">II", len(name), sum(name)) + MAGIC
    database.with_name(f"{database.name}-journal").write_bytes(header + pointer + end)


@pytest.fixture
def victim(tmp_path):
    """A file of this user."""
    path = tmp_path / "precious"
    path.write_text("of years")
    return path


@pytest.fixture
def judged(writer):
    """A session with a judgement."""
    set_label(writer.session, "prompt", ANSWER, "good", "me")
    return writer.session


def test_a_file_that_is_planted_so_is_deleted_by_sqlite(judged, victim):
    plant(judged.labels_file, victim)
    with closing(sqlite3.connect(judged.labels_file)) as db:
        db.execute("SELECT count(*) FROM judgements").fetchone()
    assert not victim.exists()


def test_reading_judgements_deletes_no_other_file(judged, victim):
    plant(judged.labels_file, victim)
    with pytest.raises(JournalError, match="would delete another file"):
        LabelReader(judged)
    assert victim.exists()


def test_judging_deletes_no_other_file(judged, victim):
    plant(judged.labels_file, victim)
    response = Response(response="other", attempt=1, step=1, index=1)
    with pytest.raises(JournalError, match="would delete another file"):
        set_label(judged, "prompt", response, "bad", "me")
    assert victim.exists()


@pytest.mark.parametrize("name", ["journal.db", "samples.db"])
def test_an_engine_deletes_no_other_file(make_session, victim, name):
    session = make_session()
    JournalWriter(session).close()
    database = session.folder / name
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
    plant(database, victim)
    with pytest.raises(JournalError, match="would delete another file"):
        JournalWriter(session)
    assert victim.exists()


def test_nothing_is_rolled_back_in_a_session_of_another_user(judged, victim):
    """Its journal may be exchanged after it was looked at."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    plant(judged.labels_file, victim)
    journal = judged.labels_file.with_name("labels.db-journal")
    before = journal.read_bytes()
    os.chown(judged.folder, 65534, -1)
    with LabelReader(judged) as reader:
        assert reader.count() == 1
    assert journal.read_bytes() == before
    assert victim.exists()


def test_judging_in_a_session_of_another_user_writes_through_no_link(writer, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    session = writer.session
    session.labels_file.symlink_to(tmp_path / "elsewhere")
    os.chown(session.folder, 65534, -1)
    with pytest.raises(SessionError, match="belongs to"):
        set_label(session, "prompt", ANSWER, "good", "me")
    assert not (tmp_path / "elsewhere").exists()


VIEW = (
    "CREATE VIEW endless AS "
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT x FROM c"
)
TRIGGER = "CREATE TRIGGER endless AFTER INSERT ON {table} BEGIN SELECT 1; END"


COLUMN = "ALTER TABLE {table} ADD COLUMN huge AS (hex(zeroblob(1000000)))"


@pytest.mark.parametrize("code", [VIEW, TRIGGER, COLUMN])
@pytest.mark.parametrize(
    ("name", "table", "use"),
    [
        ("journal.db", "meta", JournalReader),
        ("journal.db", "meta", JournalWriter),
        ("samples.db", "samples", SampleReader),
        ("samples.db", "samples", JournalWriter),
        ("labels.db", "judgements", LabelReader),
        ("labels.db", "judgements", lambda s: set_label(s, "prompt", ANSWER, "bad", "me")),
    ],
)
def test_a_database_that_computes_something_is_refused(make_session, name, table, use, code):
    """It may never end, or take all memory."""
    session = make_session()
    JournalWriter(session).close()
    set_label(session, "prompt", ANSWER, "good", "me")
    with closing(sqlite3.connect(session.folder / name)) as db:
        db.execute(code.format(table=table))
    with pytest.raises(JournalError, match=f"{name} is not as rlhf-tui writes it"):
        use(session)
