"""Judgements: written by any number of clients, read by all, exported as pairs."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest

from engine import schema
from engine.answers import SampleQuery
from engine.errors import JournalError, NoSuchSessionError, UserInputError
from engine.journal import Journal
from engine.labels import (
    Labels,
    Response,
    forget_preference,
    prefer,
    set_label,
    set_note,
    with_judgements,
)
from engine.pairs import preference_pairs
from engine.record import Record

FROM_REFERENCE = Response(response="the reference's")


def answer(step, index=0, attempt=1, response=None):
    return Response(
        response=response or f"answer {step}.{index}", attempt=attempt, step=step, index=index
    )


def judgements(session):
    with Labels(session) as labels:
        return {
            (j.answer.step, j.answer.index): (j.label, j.note)
            for j in labels.judgements().values()
        }  # fmt: skip


@pytest.fixture
def session(make_session):
    return make_session()


def test_a_session_that_nobody_has_judged_reads_as_empty(session):
    with Labels(session) as labels:
        assert labels.judgements() == {}
        assert labels.preferences() == []
    assert not session.labels_file.exists()


def test_a_judgement_has_the_words_who_and_when(session):
    set_label(session, "prompt", answer(3, 1), "hack", "ana on pts/1")
    with Labels(session) as labels:
        ((key, found),) = labels.judgements().items()
    assert key == (1, 3, 1)
    assert (found.prompt, found.answer, found.label) == ("prompt", answer(3, 1), "hack")
    assert (found.note, found.who) == (None, "ana on pts/1")
    assert abs(found.time - session.labels_file.stat().st_mtime) < 60


def test_a_later_label_replaces_the_earlier_one_and_a_note_stays(session):
    set_label(session, "p", answer(1), "good", "ana")
    set_note(session, "p", answer(1), " repeats itself ", "ana")
    set_label(session, "p", answer(1), "hack", "ben")
    assert judgements(session) == {(1, 0): ("hack", "repeats itself")}
    with Labels(session) as labels:
        assert [j.who for j in labels.judgements().values()] == ["ben"]


def test_a_judgement_never_stands_on_other_words(session):
    set_label(session, "p", answer(1), "bad", "ana")
    set_note(session, "p", answer(1), "dull", "ana")
    other = answer(1, response="after samples.db was replaced")
    row = {"attempt": 1, "step": 1, "index": 0, "response": other.response}
    assert with_judgements(session, [row])[0]["label"] is None
    set_label(session, "p", other, "good", "ben")
    with Labels(session) as labels:
        (found,) = labels.judgements().values()
    assert (found.answer, found.label, found.note) == (other, "good", None)


def test_what_is_taken_away_is_gone(session):
    set_label(session, "p", answer(1), "good", "ana")
    set_note(session, "p", answer(1), "fine", "ana")
    set_label(session, "p", answer(1), None, "ana")
    assert judgements(session) == {(1, 0): (None, "fine")}
    set_note(session, "p", answer(1), "", "ana")
    assert judgements(session) == {}


def test_an_unknown_label_is_refused(session):
    with pytest.raises(UserInputError, match="good, bad, hack"):
        set_label(session, "p", answer(1), "nice", "ana")


def test_after_a_roll_back_the_same_step_has_another_answer(writer):
    writer.steps(1, 2)
    set_label(writer.session, "prompt 0", answer(2), "bad", "ana")
    writer.journal.begin_attempt(1, fresh=True)
    writer.steps(2)
    set_label(writer.session, "prompt 0", answer(2, attempt=2), "good", "ana")
    with Record(writer.session) as record:
        rows = with_judgements(writer.session, record.samples())
        (found,) = record.sample_page(SampleQuery(judged=True), 10)
        (left,) = [r for r in record.earlier(found) if r["attempt"] == 1 and r["step"] == 2]
    assert [r["label"] for r in rows] == [None, None, "good", None]
    assert (found["step"], found["attempt"], found["label"]) == (2, 2, "good")
    assert left["label"] == "bad"


def test_a_page_has_the_judgements_and_can_be_narrowed_to_them(writer):
    writer.steps(1, 2, 3)
    with Record(writer.session) as record:
        everything = record.sample_page(SampleQuery(), 10)
        assert {(r["label"], r["note"], r["who"], r["time"]) for r in everything} == {
            (None, None, None, None)
        }
        assert record.sample_page(SampleQuery(labels="good"), 10) == []
        for step, label in ((1, "good"), (2, "bad"), (3, "hack")):
            set_label(writer.session, "prompt 0", answer(step), label, "ana")
        set_note(writer.session, "prompt 1", answer(3, 1), "look at this", "ben")

        def steps(**asked):
            rows = record.sample_page(SampleQuery(descending=False, **asked), 10)
            return [(r["step"], r["index"]) for r in rows]

        assert steps(labels="good") == [(1, 0)]
        assert steps(labels="bad hack") == [(2, 0), (3, 0)]
        assert steps(judged=True) == [(1, 0), (2, 0), (3, 0), (3, 1)]
        assert steps(judged=False) == [(1, 1), (2, 1)]
        assert steps(judged=True, text="answer 3.1") == [(3, 1)]
        (noted,) = record.sample_page(SampleQuery(text="answer 3.1"), 10)
        assert (noted["label"], noted["note"], noted["who"]) == (None, "look at this", "ben")


def test_earlier_answers_are_those_to_the_same_prompt_newest_first(writer):
    writer.steps(1, 2, 3)
    writer.journal.begin_attempt(1, fresh=True)
    writer.steps(2, 3, 4)
    with Record(writer.session) as record:
        newest = record.sample_page(SampleQuery(), 1)[0]
        found = [(r["attempt"], r["step"], r["prompt"]) for r in record.earlier(newest)]
        assert found == [
            (2, 3, "prompt 0"), (2, 2, "prompt 0"), (1, 3, "prompt 0"), (1, 2, "prompt 0"),
            (1, 1, "prompt 0"),
        ]  # fmt: skip
        (oldest,) = record.sample_page(SampleQuery(descending=False), 1)
        assert record.earlier(oldest) == []


def test_the_reference_s_answer_is_that_of_the_last_probe_that_was_answered(writer):
    def probe(command_id, text, said):
        writer.order(command_id, "probe", text=text)
        if said is None:
            writer.journal.reject_command(command_id, "too long")
        else:
            result = {"policy": {"response": "x"}, "reference": {"response": said}}
            writer.journal.apply_command(command_id, 5, [], result)

    probe("a", "a prompt", "once")
    probe("b", "a prompt", "again")
    probe("c", "a prompt", None)
    probe("d", "another", "other words")
    with Record(writer.session) as record:
        assert record.referred("a prompt") == {"response": "again", "step": 5}
        assert record.referred("never asked") is None


# -- pairs -----------------------------------------------------------------------------------------


def test_a_pair_that_is_judged_again_is_replaced(session):
    prefer(session, "p", answer(1), answer(2), "ana")
    prefer(session, "p", answer(2), answer(1), "ben")
    prefer(session, "other", answer(1), answer(2), "ana")
    with Labels(session) as labels:
        assert len(labels.preferences()) == 2
        (found,) = labels.preferences("p")
    assert (found.chosen, found.rejected, found.who) == (answer(2), answer(1), "ben")
    forget_preference(session, "p", answer(1), answer(2))
    with Labels(session) as labels:
        assert [p.prompt for p in labels.preferences()] == ["other"]


def test_the_same_words_are_no_pair(session):
    with pytest.raises(UserInputError, match="same words"):
        prefer(session, "p", answer(1, response="a"), answer(2, response="a"), "ana")
    assert not session.labels_file.exists()


def test_pairs_come_from_what_was_said_and_from_labels(session):
    prefer(session, "p", FROM_REFERENCE, answer(1), "ana")
    set_label(session, "p", answer(2), "good", "ana")
    set_label(session, "p", answer(3), "bad", "ben")
    set_label(session, "p", answer(4), "hack", "ana")
    set_label(session, "q", answer(5), "bad", "ana")
    rows = preference_pairs(session)
    assert [(r["source"], r["chosen"], r["rejected"], r["who"]) for r in rows] == [
        ("pair", "the reference's", "answer 1.0", "ana"),
        ("labels", "answer 2.0", "answer 3.0", "ana and ben"),
        ("labels", "answer 2.0", "answer 4.0", "ana"),
    ]
    first, second = rows[0], rows[1]
    assert (first["chosen_step"], first["rejected_step"]) == (None, 1)
    assert [second[f"chosen_{n}"] for n in ("attempt", "step", "index")] == [1, 2, 0]
    assert {r["prompt"] for r in rows} == {"p"}


def test_no_pair_stands_there_twice_and_what_was_said_counts_before_labels(session):
    set_label(session, "p", answer(1), "good", "ana")
    set_label(session, "p", answer(2), "bad", "ana")
    # The same words once more, at other steps.
    set_label(session, "p", answer(3, response="answer 1.0"), "good", "ana")
    set_label(session, "p", answer(4, response="answer 1.0"), "bad", "ana")
    (row,) = preference_pairs(session)
    assert (row["source"], row["chosen"], row["rejected"]) == ("labels", "answer 1.0", "answer 2.0")
    prefer(session, "p", answer(2), answer(1), "ben")
    (row,) = preference_pairs(session)
    assert (row["source"], row["chosen"], row["who"]) == ("pair", "answer 2.0", "ben")


def test_without_a_pair_it_is_said_how_to_make_one(session):
    with pytest.raises(NoSuchSessionError, match=r"no preferences yet: .* attach run"):
        preference_pairs(session)
    set_label(session, "p", answer(1), "good", "ana")
    with pytest.raises(NoSuchSessionError, match="no pair of answers to one prompt yet"):
        preference_pairs(session)


# -- the file --------------------------------------------------------------------------------------

MANY = """
import sys
from pathlib import Path
from engine.labels import Response, prefer, set_label
from engine.session import Session
session, me = Session(Path(sys.argv[1])), int(sys.argv[2])
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
    with Labels(session) as labels:
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
        assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
        assert session.labels_file.with_name("labels.db-journal").stat().st_size > 0

    kill_a_client()
    assert {note[:9] for _, note in judgements(session).values()} == {"as it was"}
    kill_a_client()
    with Record(session) as record:
        rows = record.sample_page(SampleQuery(judged=True), 10)
    assert {row["note"][:9] for row in rows} == {"as it was"}


def test_the_file_of_a_newer_version_is_refused(writer):
    writer.steps(1)
    set_label(writer.session, "p", answer(1), "good", "ana")
    db = sqlite3.connect(writer.session.labels_file)
    db.execute(f"PRAGMA user_version = {len(schema.LABELS) + 1}")
    db.close()
    for act in (
        lambda: Labels(writer.session),
        lambda: set_label(writer.session, "p", answer(1), "bad", "ana"),
        lambda: Record(writer.session).sample_page(SampleQuery(), 1),
    ):
        with pytest.raises(JournalError, match="newer rlhf-tui"):
            act()


def test_a_folder_that_cannot_be_written_is_named(session):
    session.labels_file.mkdir()
    with pytest.raises(JournalError, match=r"cannot write .*labels\.db: .* folder must be"):
        set_label(session, "p", answer(1), "good", "ana")


def test_a_damaged_file_is_named_with_what_to_do(session):
    session.labels_file.write_bytes(b"no database at all" * 100)
    with pytest.raises(JournalError, match="move it away to begin anew"):
        set_label(session, "p", answer(1), "good", "ana")
    with pytest.raises(JournalError, match=r"cannot read .*labels\.db"):
        Labels(session)


ARCHIVE = """
import sys
from pathlib import Path
from engine.answers import SampleQuery
from engine.errors import JournalError
from engine.labels import Response, set_label
from engine.record import Record
from engine.session import Session
session = Session(Path(sys.argv[1]))
with Record(session) as record:
    print([r["label"] for r in record.sample_page(SampleQuery(), 10)])
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
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    finally:
        writer.session.folder.chmod(0o700)
        writer.journal = Journal(writer.session)
    read, refused = done.stdout.splitlines()
    assert read == "['good', None]"
    assert "must be one that you can write in" in refused
