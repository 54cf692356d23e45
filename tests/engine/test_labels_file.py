"""labels.db as a file: several clients, kills, damage, archives."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest

from engine.errors import JournalError
from engine.journal import schema
from engine.journal.judgements.labels import LabelReader, set_label, set_note
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.journal.writer import JournalWriter
from tests.judging import answer, judgements


@pytest.fixture
def session(make_session):
    return make_session()


MANY = """
import sys
from pathlib import Path
from engine.journal.judgements.labels import Response, prefer, set_label
from engine.session.folder import SessionFolder
session, me = SessionFolder(Path(sys.argv[1])), int(sys.argv[2])
sys.stdin.readline()
for step in range(20):
    answer = Response(response=f"{me}.{step}", attempt=1, step=step, index=me)
    set_label(session, "p", answer, "good", str(me))
    prefer(session, "p", answer, Response(response="reference"), str(me))
"""
KILLED = """
import os, signal, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA cache_size = 1")
db.execute("UPDATE judgements SET note = hex(randomblob(20000))")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_clients_that_write_at_once_lose_nothing(session):
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", MANY, session.folder, str(me)], stdin=subprocess.PIPE
        )
        for me in range(3)
    ]
    for client in clients:
        client.stdin.write(b"\n")
        client.stdin.close()
    assert [client.wait(timeout=120) for client in clients] == [0, 0, 0]
    with LabelReader(session) as labels:
        assert len(labels.judgements()) == 60
        assert len(labels.preferences()) == 60
    assert [p.name for p in session.folder.glob("labels.db*")] == ["labels.db"]


def test_a_client_that_is_killed_in_the_middle_of_a_change_leaves_the_earlier_state(writer):
    writer.steps(1, 2)
    session = writer.session
    for index in range(2):
        set_label(session, f"prompt {index}", answer(1, index), "good", "ana")
        set_note(session, f"prompt {index}", answer(1, index), "as it was " * 2000, "ana")

    def kill_a_client():
        command = [sys.executable, "-c", KILLED, session.labels_file]
        assert subprocess.run(command, timeout=240, check=False).returncode == -signal.SIGKILL
        assert session.labels_file.with_name("labels.db-journal").stat().st_size > 0

    kill_a_client()
    assert {note[:9] for _, note in judgements(session).values()} == {"as it was"}
    kill_a_client()
    with JournalReader(session) as reader:
        rows = reader.samples.page(SampleQuery(judged=True), 10)
    assert {row.note[:9] for row in rows} == {"as it was"}


def test_the_file_of_a_newer_version_is_refused(writer):
    writer.steps(1)
    set_label(writer.session, "p", answer(1), "good", "ana")
    db = sqlite3.connect(writer.session.labels_file)
    db.execute(f"PRAGMA user_version = {len(schema.LABELS) + 1}")
    db.close()
    for act in (
        lambda: LabelReader(writer.session),
        lambda: set_label(writer.session, "p", answer(1), "bad", "ana"),
        lambda: JournalReader(writer.session).samples.page(SampleQuery(), 1),
    ):
        with pytest.raises(JournalError, match="newer rlhf-tui"):
            act()


def test_a_folder_that_cannot_be_written_is_named(session):
    session.labels_file.mkdir()
    with pytest.raises(JournalError, match=r"cannot write .*labels\.db: .* write permission"):
        set_label(session, "p", answer(1), "good", "ana")


def test_a_damaged_file_is_named_with_what_to_do(session):
    session.labels_file.write_bytes(b"no database at all" * 100)
    with pytest.raises(JournalError, match="move the file away to start a new one"):
        set_label(session, "p", answer(1), "good", "ana")
    with pytest.raises(JournalError, match=r"cannot read .*labels\.db"):
        LabelReader(session)


ARCHIVE = """
import sys
from pathlib import Path
from engine.errors import JournalError
from engine.journal.judgements.labels import Response, set_label
from engine.journal.samples import SampleQuery, SampleReader
from engine.session.folder import SessionFolder
session = SessionFolder(Path(sys.argv[1]))
with SampleReader(session) as samples:
    print([s.label for s in samples.page(SampleQuery(), 10)])
try:
    set_label(session, "prompt 0", Response(response="a", attempt=1, step=1, index=0), "bad", "me")
except JournalError as error:
    print(error)
"""


def test_an_archive_that_cannot_be_written_is_read(writer):
    writer.steps(1)
    set_label(writer.session, "prompt 0", answer(1), "good", "ana")
    writer.journal.close()
    # Root may write everywhere but for this.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] * (os.geteuid() == 0)
    if drop and shutil.which("setpriv") is None:
        pytest.skip("root without setpriv may write everywhere")
    writer.session.labels_file.chmod(0o400)
    writer.session.folder.chmod(0o500)
    try:
        done = subprocess.run(
            [*drop, sys.executable, "-c", ARCHIVE, writer.session.folder],
            capture_output=True, text=True, timeout=240, check=True,
        )  # fmt: skip
    finally:
        writer.session.folder.chmod(0o700)
        writer.journal = JournalWriter(writer.session)
    read, refused = done.stdout.splitlines()
    assert read == "['good', None]"
    assert "you need write permission" in refused
