"""Checks the integrity of a session's databases, and finds lost rows in write-ahead logs."""

import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from engine.errors import JournalError
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.session.access import open_to_read
from engine.session.folder import SessionFolder
from engine.verification.finding import Finding, note, problem

RESTORE = "restore the file from a copy of the session, or fork from a checkpoint of such a copy"
_HEADER = struct.Struct(">8I")
"""Magic number, version, page size, sequence, two salts, two sums (https://sqlite.org/walformat.html)."""
_FRAME = struct.Struct(">6I")
"""Page, size of the database after a commit or 0, two salts, two sums."""
_MIN_PAGE = 512
_MAGIC = 0x377F0682
"""The magic number if sums are over little-endian words; one more for big-endian words."""


def check_databases(session: SessionFolder, *, live: bool) -> Iterator[Finding]:
    """Checks each database with SQLite's `integrity_check`, and a crashed one's write-ahead log.

    Args:
        session: to check.
        live: whether an engine is running the session; its write-ahead logs are then in use.
    """
    for path, migrations in (
        (session.journal_file, schema.JOURNAL),
        (session.samples_file, schema.SAMPLES),
        (session.labels_file, schema.LABELS),
    ):
        if not path.is_file():
            continue
        wal = path.with_name(f"{path.name}-wal")
        if not path.stat().st_size and not (wal.is_file() and wal.stat().st_size):
            text = f"{path.name} is empty: it was never used, or its contents are lost"
            yield note("files", text, "nothing if there was nothing in it; else restore it")
        try:
            with closing(ReadOnlyDatabase(path, migrations)) as database:
                if database.connection is None and path.stat().st_size:
                    yield _without_tables(path)
                rows = [str(row[0]) for row in database.rows("PRAGMA integrity_check(3)")]
        except JournalError as error:
            yield problem("files", str(error), RESTORE)
            continue
        if rows and rows != ["ok"]:
            what = rows[0].replace("\n", " ")
            yield problem("files", f"{path.name} is damaged: {what}", RESTORE)
        if not live and wal.is_file() and (lost := _lost_transactions(wal)):
            yield problem("files", f"{wal.name} is damaged: {lost}", RESTORE)


def _without_tables(path: Path) -> Finding:
    """Describes a file without tables: SQLite also reads a file cut below a page as empty."""
    size = path.stat().st_size
    if size < _MIN_PAGE:
        return problem("files", f"{path.name} is cut short, to {size} bytes", RESTORE)
    text = f"{path.name} has no tables: its creator died"
    return note("files", text, "the next one that writes creates them")


def _lost_transactions(wal: Path) -> str:
    """The committed part of a write-ahead log that SQLite will not read; empty if there is none.

    SQLite reads a log up to the first frame with a wrong sum and silently ignores the rest, because
    a crash leaves the last transaction unfinished. A later frame that ends a transaction of the
    same log shows that more than that is missing.
    """
    with open_to_read(wal) as file:
        data = file.read()
    if len(data) < _HEADER.size + _FRAME.size:
        return ""
    magic, _, page, _, *salts = _HEADER.unpack_from(data)[:6]
    order = ">" if magic & 1 else "<"
    sums = _add(order, data[: _HEADER.size - 8], (0, 0))
    size = _FRAME.size + page
    if magic & ~1 != _MAGIC or sums != _HEADER.unpack_from(data)[6:] or size < 512:
        return f"its header cannot be read, and {len(data)} bytes of the newest rows with it"
    bad: int | None = None
    lost = 0
    for at in range(_HEADER.size, len(data) - size + 1, size):
        _, commit, *rest = _FRAME.unpack_from(data, at)
        if rest[:2] != salts:
            if bad is None:  # the rest is of an earlier use of the file
                bad = at
            continue
        if bad is None:
            sums = _add(order, data[at : at + 8], sums)
            sums = _add(order, data[at + _FRAME.size : at + size], sums)
            bad = at if list(sums) != rest[2:] else None
        if bad is not None and commit and at != bad:
            lost += 1
    return f"{lost} transactions after byte {bad} cannot be read" if lost else ""


def _add(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    """Continues the sums of a write-ahead log over a multiple of eight bytes."""
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for a, b in zip(words[::2], words[1::2], strict=True):
        first = (first + a + second) & 0xFFFFFFFF
        second = (second + b + first) & 0xFFFFFFFF
    return first, second
