"""The operators' judgements: labels and notes on responses, and preferences between responses.

Clients write them to `labels.db`, with or without a live engine. Several clients can write at the
same time: SQLite locks the file for the duration of each change. The file uses a rollback journal
instead of WAL, because that works across hosts, leaves no files beside the database, and updates
the modification time of the file with each change.

A response is identified by attempt, step and index, because after a rollback the same step has
other responses. Prompt and response are stored with the judgement: an export needs no other file.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from typing import Any, Self

import msgspec

from engine.errors import JournalError, SessionError, UserInputError
from engine.journal import schema
from engine.journal.database import (
    MAKE_ROOM,
    ReadOnlyDatabase,
    check_rollback_journal,
    check_schema,
    connect,
    has_no_room,
)
from engine.journal.history.views import label_views, views_of
from engine.journal.rows import Judgement, SampleRow
from engine.session import access
from engine.session.folder import SessionFolder

LABELS = ("good", "bad", "hack")
BUSY_TIMEOUT = 10.0
"""Seconds to wait for another client to finish its change."""
NEXT_SEQ = (
    "(SELECT ifnull(max(seq), 0) + 1 FROM "
    "(SELECT seq FROM judgements UNION ALL SELECT seq FROM preferences))"
)
"""SQL: the number of the row that is being written."""

Key = tuple[int, int, int]
"""Attempt, step, index."""


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """A response and its origin. Attempt, step and index are None for the reference's responses."""

    response: str
    attempt: int | None = None
    step: int | None = None
    index: int | None = None

    @classmethod
    def of(cls, sample: SampleRow) -> "Response":
        """The response of a sample."""
        return cls(
            response=sample.response, attempt=sample.attempt, step=sample.step, index=sample.index
        )


class JudgedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response and its judgement."""

    prompt: str
    response: Response
    judgement: Judgement
    order: float
    """Increases with each judgement of this session, unlike the times."""


class Preference(msgspec.Struct, frozen=True, kw_only=True):
    """The preferred one of two responses to a prompt."""

    prompt: str
    chosen: Response
    rejected: Response
    who: str
    time: float
    order: float = 0.0
    """As for :class:`JudgedResponse`; 0 if it is not recorded yet."""


# -- writing ---------------------------------------------------------------------------------------


def set_label(
    session: SessionFolder, prompt: str, response: Response, label: str | None, who: str
) -> None:
    """Sets or replaces the label of a response, or removes it if `label` is None. Keeps a note.

    Raises:
        JournalError: the file cannot be written.
        UserInputError: the label is not one of :data:`LABELS`.
    """
    if label is not None and label not in LABELS:
        raise UserInputError(f"'{label}' is not a label: use one of {', '.join(LABELS)}")
    _judge(session, prompt, response, "label", label, who)


def set_note(session: SessionFolder, prompt: str, response: Response, note: str, who: str) -> None:
    """Sets or replaces the note on a response, or removes it if `note` is empty. Keeps a label.

    Raises:
        JournalError: the file cannot be written.
    """
    _judge(session, prompt, response, "note", note.strip() or None, who)


def _judge(
    session: SessionFolder,
    prompt: str,
    response: Response,
    column: str,
    value: str | None,
    who: str,
) -> None:
    values = msgspec.structs.asdict(response)
    with _writing(session) as db:
        # Another response under the same key: samples.db was replaced, so attempts restarted at 1.
        db.execute(
            "DELETE FROM judgements WHERE attempt = :attempt AND step = :step AND idx = :index "
            "AND response <> :response",
            values,
        )
        db.execute(
            "INSERT INTO judgements "  # noqa: S608 - one of two constant columns
            f"(attempt, step, idx, prompt, response, who, time, {column}, seq) "
            "VALUES (:attempt, :step, :index, :prompt, :response, :who, :time, :value, "
            f"{NEXT_SEQ}) "
            "ON CONFLICT DO UPDATE SET who = excluded.who, time = excluded.time, "
            f"seq = excluded.seq, {column} = excluded.{column}",
            values | {"prompt": prompt, "who": who, "time": time.time(), "value": value},
        )
        db.execute("DELETE FROM judgements WHERE label IS NULL AND note IS NULL")


def prefer(
    session: SessionFolder, prompt: str, chosen: Response, rejected: Response, who: str
) -> None:
    """Records a preference between two responses; replaces an earlier one between the same two.

    Raises:
        JournalError: the file cannot be written.
        UserInputError: the responses have the same text.
    """
    if chosen.response == rejected.response:
        raise UserInputError("the two responses are identical: neither can be preferred")
    with _writing(session) as db:
        _delete_preference(db, prompt, chosen, rejected)
        db.execute(
            f"INSERT INTO preferences VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {NEXT_SEQ})",  # noqa: S608 - a constant
            (
                prompt, chosen.response, rejected.response,
                chosen.attempt, chosen.step, chosen.index,
                rejected.attempt, rejected.step, rejected.index, who, time.time(),
            ),
        )  # fmt: skip


def forget_preference(session: SessionFolder, prompt: str, one: Response, other: Response) -> None:
    """Deletes the preference between two responses, if there is one. Raises JournalError."""
    with _writing(session) as db:
        _delete_preference(db, prompt, one, other)


def _delete_preference(db: sqlite3.Connection, prompt: str, one: Response, other: Response) -> None:
    db.execute(
        "DELETE FROM preferences WHERE prompt = :prompt AND "
        "((chosen = :a AND rejected = :b) OR (chosen = :b AND rejected = :a))",
        {"prompt": prompt, "a": one.response, "b": other.response},
    )


@contextlib.contextmanager
def _writing(session: SessionFolder) -> Iterator[sqlite3.Connection]:
    """Context manager of one transaction; creates the file if it is missing.

    Raises:
        JournalError: it cannot be written.
        SessionError: the session belongs to another user, whose file could be a link to any other.
    """
    path = session.labels_file
    session.check_owner()
    try:
        access.create_file(path)
        check_rollback_journal(path)
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT)) as db:
            check_schema(db, path)
            db.execute("PRAGMA journal_mode = DELETE")
            schema.migrate(db, schema.LABELS, path)
            with db:
                db.execute("BEGIN IMMEDIATE")
                yield db
    except OSError as error:
        advice = MAKE_ROOM if has_no_room(error) else DEFAULT_ADVICE
        raise JournalError(f"cannot write {path}: {error.strerror}; {advice}") from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
        advice = MAKE_ROOM if has_no_room(error) else ADVICE.get(code, DEFAULT_ADVICE)
        raise JournalError(f"cannot write {path}: {error}; {advice}") from error


DEFAULT_ADVICE = "you need write permission for the session's folder"
ADVICE = {
    sqlite3.SQLITE_BUSY: "another program has locked it: try again",
    sqlite3.SQLITE_CORRUPT: "move the file away to start a new one",
    sqlite3.SQLITE_NOTADB: "move the file away to start a new one",
}

# -- reading ---------------------------------------------------------------------------------------


class LabelReader:
    """Reads the judgements of a session. Without `labels.db` there are none."""

    def __init__(self, session: SessionFolder) -> None:
        """Opens `labels.db`.

        Raises:
            JournalError: it cannot be read, or a newer version wrote it.
        """
        _roll_back_interrupted_change(session)
        self._db = ReadOnlyDatabase(
            session.labels_file, schema.LABELS, views_of(session, label_views)
        )

        numbered = self._db.version >= schema.JUDGEMENTS_ARE_NUMBERED
        # A copy of an older file has no numbers.
        self._order = "ifnull(seq, time)" if numbered else "time"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def count(self) -> int:
        """The number of judgements and preferences."""
        count = self._db.value(
            "SELECT (SELECT count(*) FROM judgements) + (SELECT count(*) FROM preferences)"
        )
        return count or 0

    def judgements(self) -> dict[Key, JudgedResponse]:
        """All judgements, in the order in which they were made."""
        rows = self._db.rows(
            "SELECT attempt, step, idx, prompt, response, label, note, who, time, "  # noqa: S608 - constants
            f"{self._order} AS number FROM judgements ORDER BY number"
        )
        return {
            (attempt, step, index): JudgedResponse(
                prompt=prompt,
                response=Response(response=response, attempt=attempt, step=step, index=index),
                judgement=Judgement(label=label, note=note, who=who, time=time),
                order=order,
            )
            for attempt, step, index, prompt, response, label, note, who, time, order in rows
        }

    def preferences(self, prompt: str | None = None) -> list[Preference]:
        """All preferences, or those of one prompt, in the order in which they were recorded."""
        rows = self._db.rows(
            f"SELECT prompt, who, time, {self._order} AS number, "  # noqa: S608 - constants
            "chosen, chosen_attempt, chosen_step, chosen_idx, "
            "rejected, rejected_attempt, rejected_step, rejected_idx FROM preferences "
            "WHERE :prompt IS NULL OR prompt = :prompt ORDER BY number",
            {"prompt": prompt},
        )
        return [
            Preference(
                prompt=text, who=who, time=time, order=order, chosen=_response(columns[:4]),
                rejected=_response(columns[4:]),
            )
            for text, who, time, order, *columns in rows
        ]  # fmt: skip


def _response(columns: list[Any]) -> Response:
    response, attempt, step, index = columns
    return Response(response=response, attempt=attempt, step=step, index=index)


def attach(db: sqlite3.Connection, session: SessionFolder) -> bool:
    """Attaches `labels.db` to a connection under the name `labels`.

    Returns:
        False if there are no labels yet.

    Raises:
        JournalError: the file cannot be read, or a newer version wrote it.
    """
    path = session.labels_file
    _roll_back_interrupted_change(session)
    opened = connect(path, len(schema.LABELS))
    if opened is None:
        return False
    connection, uri = opened
    connection.close()
    try:
        db.execute("ATTACH ? AS labels", (uri,))
    except sqlite3.Error as error:
        raise JournalError(f"cannot read {path}: {error}") from error
    return True


def _roll_back_interrupted_change(session: SessionFolder) -> None:
    """Rolls back the unfinished change of a killed client; a read-only connection cannot.

    Not in a session of another user, whose files may be exchanged at any moment.

    Raises:
        JournalError: it is not a change of ours.
    """
    path = session.labels_file
    journal = path.with_name(f"{path.name}-journal")
    if not journal.is_file():
        return
    try:
        access.check_owner(session.folder, path, journal)
    except SessionError:
        return
    uri = f"{path.resolve().as_uri()}?mode=rw"
    with contextlib.suppress(OSError, sqlite3.Error):  # the read that follows reports the error
        check_rollback_journal(path)
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT)) as db:
            schema.schema_version(db)
