"""Journals that are missing, old, newer, archived or something else: read, migrated or refused."""

import os
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from engine.errors import JournalError
from engine.journal import schema
from engine.journal.database import open_read_only
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleReader
from engine.journal.writer import JournalWriter
from engine.session import machine
from engine.session.folder import SessionFolder
from engine.session.machine import on_network

DATA = Path(__file__).parent / "data"


def scores(session):
    with JournalReader(session) as reader:
        return dict(reader.metrics.series("objective/scores"))


def test_a_session_that_never_began_reads_as_empty(make_session):
    with JournalReader(make_session("new")) as reader:
        assert reader.metrics.rows() == reader.events() == reader.attempts() == []
        assert reader.last_step() == 0


def test_a_new_session_is_starting_until_its_engine_could_have_locked_it(make_session):
    session = make_session("new")
    with JournalReader(session) as reader:
        assert reader.state() == "starting"
        long_ago = time.time() - 60
        os.utime(session.config_file, (long_ago, long_ago))
        assert reader.state() == "crashed"


def test_a_new_session_whose_engine_died_before_it_recorded_anything_has_crashed(make_session):
    session = make_session("new")
    session.write_engine("/a/socket", "1.0")
    with JournalReader(session) as reader:
        assert reader.state() == "crashed"


def test_a_journal_that_is_made_while_it_is_looked_for_is_not_there_yet(make_session, monkeypatch):
    path, look = make_session("new").journal_file, os.stat

    def look_too_early(place, *args, **options):
        try:
            return look(place, *args, **options)
        except FileNotFoundError:
            if place == path:
                path.touch()
            raise

    monkeypatch.setattr(os, "stat", look_too_early)
    assert open_read_only(path, len(schema.JOURNAL)) is None
    assert path.exists()


def test_a_journal_of_a_newer_version_is_refused_by_reader_and_writer(writer):
    writer.journal.close()
    with sqlite3.connect(writer.session.journal_file) as db:
        db.execute(f"PRAGMA user_version = {len(schema.JOURNAL) + 1}")
    for opening in (JournalWriter, JournalReader):
        with pytest.raises(JournalError, match="newer"):
            opening(writer.session)
    with sqlite3.connect(writer.session.journal_file) as db:
        db.execute(f"PRAGMA user_version = {len(schema.JOURNAL)}")
    writer.journal = JournalWriter(writer.session)


def test_a_file_that_is_no_journal_is_refused_in_a_sentence(make_session):
    session = make_session("odd")
    session.journal_file.write_bytes(b"nothing of ours" * 300)
    for opening in (JournalWriter, JournalReader):
        with pytest.raises(JournalError, match=r"journal\.db"):
            opening(session)


def test_migrations_are_taken_in_order_each_once(tmp_path):
    path = tmp_path / "some.db"
    scripts = ["CREATE TABLE a (x);", "INSERT INTO a VALUES (1);", "INSERT INTO a VALUES (2);"]
    db = sqlite3.connect(path)
    schema.migrate(db, scripts[:2], path)
    schema.migrate(db, scripts, path)
    schema.migrate(db, scripts, path)
    assert db.execute("SELECT x FROM a").fetchall() == [(1,), (2,)]
    assert schema.schema_version(db) == 3
    with pytest.raises(JournalError, match="newer"):
        schema.migrate(db, scripts[:1], path)
    # One that fails leaves nothing of itself.
    with pytest.raises(sqlite3.Error):
        schema.migrate(db, [*scripts, "CREATE TABLE b (x); INSERT INTO nowhere VALUES (1);"], path)
    db.close()
    db = sqlite3.connect(path)
    assert schema.schema_version(db) == 3
    assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'b'").fetchone() == (0,)
    db.close()


@pytest.fixture
def old(tmp_path, make_session):
    """A session of version 1, as it was checked in."""
    session = make_session("old")
    shutil.copy(DATA / "journal-v1.db", session.journal_file)
    shutil.copy(DATA / "samples-v1.db", session.samples_file)
    return session


def test_an_old_journal_is_read(old):
    assert scores(old) == {1: 1.1, 2: 2.2, 3: 3.2}
    with JournalReader(old) as reader:
        assert [a.from_step for a in reader.attempts()] == [0, 1]
        assert reader.commands()[0].changes[0].new == 0.2
        assert reader.samples.newest()[-1].response == "answer 3.1"
        assert reader.samples.arrays(3, 0, 2).tokens == ["a", "b"]
        assert [c.step for c in reader.checkpoints()] == [1, 3]
        assert reader.metrics.past_series("objective/scores") == [(1, 2, 2.1)]


def test_an_old_journal_is_migrated_and_continued(old):
    journal = JournalWriter(old)
    assert (journal.attempt, journal.step) == (2, 3)
    journal.begin_attempt(3, fresh=False)
    assert [s.changes[0].new for s in journal.commands.changes_after(1)] == [0.2]
    journal.close()
    assert scores(old) == {1: 1.1, 2: 2.2, 3: 3.2}


def test_an_archived_copy_is_read_where_nothing_can_be_written(old, tmp_path, monkeypatch):
    # Root may write anywhere: what a read-only folder does to SQLite is made by hand.
    connect = sqlite3.connect
    asked = []

    def without_writing(database, **options):
        asked.append(database)
        if "immutable" not in database:
            raise sqlite3.OperationalError("unable to open database file")
        return connect(database, **options)

    monkeypatch.setattr(sqlite3, "connect", without_writing)
    assert scores(old) == {1: 1.1, 2: 2.2, 3: 3.2}
    assert any("immutable=1" in uri for uri in asked)


def test_an_archived_crash_is_read_to_its_last_row_where_nothing_can_be_written(
    writer, tmp_path, monkeypatch
):
    writer.steps(*range(1, 56))
    archive = SessionFolder(tmp_path / "archive" / "run")
    # As a crash leaves it, and copied without the shared memory: all rows are in the -wal.
    shutil.copytree(writer.session.folder, archive.folder, ignore=shutil.ignore_patterns("*-shm"))
    connect = sqlite3.connect

    def without_writing(database, **options):
        if not any(word in database for word in ("immutable", "unix-none")):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(database, **options)

    monkeypatch.setattr(sqlite3, "connect", without_writing)
    assert len(scores(archive)) == 55
    with SampleReader(archive) as samples:
        assert len(samples.newest()) == 2 * 55
    assert not list(archive.folder.glob("*-shm"))


def test_a_path_with_signs_that_mean_something_in_a_uri_is_read(make_session, write_in, tmp_path):
    folder = tmp_path / "sessions" / "a?b=c#d %41 é"
    shutil.copytree(make_session("plain").folder, folder)
    writer = write_in(SessionFolder(folder))
    writer.journal.begin_attempt(0, fresh=False)
    writer.steps(1)
    writer.journal.close()
    assert scores(SessionFolder(folder)) == {1: 1.1}


def test_a_local_folder_is_not_taken_for_a_network_one(tmp_path):
    assert not on_network(tmp_path)


@pytest.mark.parametrize("name", ["a b", "a\tb", "a\nb", "a\\b", "a\u00a0b", "日本"])
def test_a_mounted_network_file_system_is_known_whatever_its_path(tmp_path, monkeypatch, name):
    monkeypatch.setattr(machine, "NETWORK_FILE_SYSTEMS", {"tmpfs"})
    mount = tmp_path / name
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mount], check=False)
    if mounted.returncode:
        pytest.skip("only root can mount")
    try:
        assert on_network(mount)
        assert on_network(mount / "sessions")
        assert not on_network(tmp_path / f"{name}c")
    finally:
        subprocess.run(["umount", mount], check=True)


def test_the_samples_up_to_a_checkpoint_are_on_disk_before_it_counts(writer, monkeypatch):
    synced, fsync = [], os.fsync

    def recorded(fd):
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", recorded)
    writer.steps(1)
    assert synced == []
    writer.journal.checkpoints.record(1, 1000, 0.5, 1.5)
    assert synced == [f"{writer.session.samples_file}-wal"]
