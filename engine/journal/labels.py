"""The operators' judgements: labels and notes on answers, and which of two answers is better.

Clients write them, any number at once, whether an engine lives or not: SQLite locks `labels.db` for
each change and not in between. A rollback journal, not WAL: it works between hosts, leaves nothing
beside the file, and each change shows in the file's own time.

An answer is known by attempt, step and index: after a roll back the same step has other answers.
Its words are kept with the judgement, so that an export needs nothing else.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec

from engine.errors import JournalError, UserInputError
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase, connect
from engine.journal.rows import Judgement, SampleRow
from engine.session import access
from engine.session.folder import Session

LABELS = ("good", "bad", "hack")
BUSY = 10.0
"""Seconds to wait for another client's change."""

Key = tuple[int, int, int]
"""Attempt, step, index."""


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """An answer's words and where they came from; None: from the reference."""

    response: str
    attempt: int | None = None
    step: int | None = None
    index: int | None = None

    @classmethod
    def of(cls, sample: SampleRow) -> "Response":
        """Of a sample."""
        return cls(
            response=sample.response, attempt=sample.attempt, step=sample.step, index=sample.index
        )


class JudgedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response with what is thought of it."""

    prompt: str
    answer: Response
    judgement: Judgement


class Preference(msgspec.Struct, frozen=True, kw_only=True):
    """Of two answers to a prompt the better one."""

    prompt: str
    chosen: Response
    rejected: Response
    who: str
    time: float


# -- writing ---------------------------------------------------------------------------------------


def set_label(session: Session, prompt: str, answer: Response, label: str | None, who: str) -> None:
    """Labels an answer in place of an earlier label; None takes that away. A note stays.

    Raises:
        JournalError: the file cannot be written.
        UserInputError: it is none of LABELS.
    """
    if label is not None and label not in LABELS:
        raise UserInputError(f"'{label}' is no label: give one of {', '.join(LABELS)}")
    _judge(session, prompt, answer, "label", label, who)


def set_note(session: Session, prompt: str, answer: Response, note: str, who: str) -> None:
    """Writes a note on an answer in place of an earlier one; "" takes that away. A label stays.

    Raises:
        JournalError: the file cannot be written.
    """
    _judge(session, prompt, answer, "note", note.strip() or None, who)


def _judge(
    session: Session, prompt: str, answer: Response, column: str, value: str | None, who: str
) -> None:
    values = msgspec.structs.asdict(answer)
    with _writing(session.labels_file) as db:
        # Other words in its place: samples.db was replaced, and attempts began at 1 again.
        db.execute(
            "DELETE FROM judgements WHERE attempt = :attempt AND step = :step AND idx = :index "
            "AND response <> :response",
            values,
        )
        db.execute(
            "INSERT INTO judgements "  # noqa: S608 - one of two columns of ours
            f"(attempt, step, idx, prompt, response, who, time, {column}) "
            "VALUES (:attempt, :step, :index, :prompt, :response, :who, :time, :value) "
            "ON CONFLICT DO UPDATE SET who = excluded.who, time = excluded.time, "
            f"{column} = excluded.{column}",
            values | {"prompt": prompt, "who": who, "time": time.time(), "value": value},
        )
        db.execute("DELETE FROM judgements WHERE label IS NULL AND note IS NULL")


def prefer(session: Session, prompt: str, chosen: Response, rejected: Response, who: str) -> None:
    """Notes that one answer is better than another one, in place of what was said of the two.

    Raises:
        JournalError: the file cannot be written.
        UserInputError: they are the same words.
    """
    if chosen.response == rejected.response:
        raise UserInputError("these two answers are the same words: neither is the better one")
    with _writing(session.labels_file) as db:
        _forget(db, prompt, chosen, rejected)
        db.execute(
            "INSERT INTO preferences VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                prompt, chosen.response, rejected.response,
                chosen.attempt, chosen.step, chosen.index,
                rejected.attempt, rejected.step, rejected.index, who, time.time(),
            ),
        )  # fmt: skip


def forget_preference(session: Session, prompt: str, one: Response, other: Response) -> None:
    """Takes back what was said of two answers. Raises JournalError."""
    with _writing(session.labels_file) as db:
        _forget(db, prompt, one, other)


def _forget(db: sqlite3.Connection, prompt: str, one: Response, other: Response) -> None:
    db.execute(
        "DELETE FROM preferences WHERE prompt = :prompt AND "
        "((chosen = :a AND rejected = :b) OR (chosen = :b AND rejected = :a))",
        {"prompt": prompt, "a": one.response, "b": other.response},
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[sqlite3.Connection]:
    """One change, whole or not at all; makes the file where there is none."""
    try:
        access.create_file(path)
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY)) as db:
            db.execute("PRAGMA journal_mode = DELETE")
            schema.migrate(db, schema.LABELS, path)
            with db:
                db.execute("BEGIN IMMEDIATE")
                yield db
    except OSError as error:
        raise JournalError(f"cannot write {path}: {error.strerror}; {ADVICE_ELSE}") from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the kind, without its details
        advice = ADVICE.get(code, ADVICE_ELSE)
        raise JournalError(f"cannot write {path}: {error}; {advice}") from error


ADVICE_ELSE = "the session's folder must be one that you can write in"
ADVICE = {
    sqlite3.SQLITE_BUSY: "another program holds it: try again",
    sqlite3.SQLITE_FULL: "free some space and try again",
    sqlite3.SQLITE_CORRUPT: "move it away to begin anew",
    sqlite3.SQLITE_NOTADB: "move it away to begin anew",
}

# -- reading ---------------------------------------------------------------------------------------


class LabelReader:
    """What the operators think; a session that nobody has judged reads as empty."""

    def __init__(self, session: Session) -> None:
        """Opens the labels.

        Raises:
            JournalError: they cannot be read, or a newer version wrote them.
        """
        _finish_change(session.labels_file)
        self._db = ReadOnlyDatabase(session.labels_file, schema.LABELS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def judgements(self) -> dict[Key, JudgedResponse]:
        """Every judgement, the oldest first."""
        rows = self._db.rows(
            "SELECT attempt, step, idx, prompt, response, label, note, who, time "
            "FROM judgements ORDER BY time"
        )
        return {
            (attempt, step, index): JudgedResponse(
                prompt=prompt,
                answer=Response(response=response, attempt=attempt, step=step, index=index),
                judgement=Judgement(label=label, note=note, who=who, time=time),
            )
            for attempt, step, index, prompt, response, label, note, who, time in rows
        }

    def preferences(self, prompt: str | None = None) -> list[Preference]:
        """Every pair, or those of one prompt, the oldest first."""
        rows = self._db.rows(
            "SELECT prompt, who, time, chosen, chosen_attempt, chosen_step, chosen_idx, "
            "rejected, rejected_attempt, rejected_step, rejected_idx FROM preferences "
            "WHERE :prompt IS NULL OR prompt = :prompt ORDER BY time",
            {"prompt": prompt},
        )
        return [
            Preference(
                prompt=asked, who=who, time=time, chosen=_response(sides[:4]),
                rejected=_response(sides[4:]),
            )
            for asked, who, time, *sides in rows
        ]  # fmt: skip


def _response(columns: list[Any]) -> Response:
    response, attempt, step, index = columns
    return Response(response=response, attempt=attempt, step=step, index=index)


def attach(db: sqlite3.Connection, session: Session) -> bool:
    """Makes `labels.judgements` known to a connection that reads; False where there are none yet.

    Raises:
        JournalError: it cannot be read, or a newer version wrote it.
    """
    path = session.labels_file
    _finish_change(path)
    found = connect(path, len(schema.LABELS))
    if found is None:
        return False
    probe, uri = found
    probe.close()
    try:
        db.execute("ATTACH ? AS labels", (uri,))
    except sqlite3.Error as error:
        raise JournalError(f"cannot read {path}: {error}") from error
    return True


def _finish_change(path: Path) -> None:
    """Undoes what a client left half done when it was killed: who only reads could not read it."""
    if path.with_name(f"{path.name}-journal").is_file():
        uri = f"{path.resolve().as_uri()}?mode=rw"
        with (
            contextlib.suppress(sqlite3.Error),  # the reading that follows says what is wrong
            contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY)) as db,
        ):
            schema.schema_version(db)
