"""Copies journal and samples to a fork, up to the step that it starts from."""

import sqlite3
from contextlib import closing
from pathlib import Path

from engine.journal import schema
from engine.journal.database import open_read_only
from engine.session import access
from engine.session.folder import SessionFolder

PART_NAME = "part.db"
"""The name of a copy until it is whole, not longer than the names of files that SQLite writes.
It is there from the start of a fork, whose checkpoint is copied before the databases."""
TRUNCATE_JOURNAL = (
    "DELETE FROM metrics WHERE step > :step",
    "DELETE FROM steps WHERE step > :step",
    "DELETE FROM metrics_past",
    "DELETE FROM steps_past",
    "DELETE FROM events WHERE step > :step OR (kind = 'command' AND json_extract(data, '$.id') IN "
    "(SELECT id FROM commands WHERE live = 0 OR applied_step IS NULL OR applied_step > :step))",
    # What its source went through after the checkpoint, at the same step or after a resume.
    "DELETE FROM events WHERE id > (SELECT max(id) FROM events WHERE kind = 'checkpoint' "
    "AND step = :step) AND (kind IN ('attempt', 'ready', 'state', 'error') "
    "OR (kind = 'alert' AND json_extract(data, '$.rule') = 'restart'))",
    # A note keeps its command, also one after the checkpoint's step or on an abandoned branch.
    "DELETE FROM commands WHERE (live = 0 OR applied_step IS NULL OR applied_step > :step) "
    "AND id NOT IN (SELECT ifnull(json_extract(data, '$.id'), '') FROM events WHERE kind = 'note')",
    "DELETE FROM meta WHERE key IN ('reseed', 'settings', 'message', 'pause_reason', 'deadline', "
    "'exit_code', 'total_steps', 'best_metric')",
    "UPDATE meta SET value = json_quote('starting') WHERE key = 'state'",
    "DELETE FROM checkpoints WHERE step <> :step OR status NOT IN ('complete', 'written')",
    "UPDATE checkpoints SET status = 'complete', kept = 0",
)
"""Remove what came after the step, and what the source alone went through."""
TRUNCATE_SAMPLES = (
    "DELETE FROM samples WHERE step > :step",
    "DELETE FROM arrays WHERE step > :step",
    "DELETE FROM samples_past",
    "DELETE FROM evaluated WHERE step > :step",
    "DELETE FROM evaluated_past",
)


def copy_until(source: SessionFolder, target: SessionFolder, step: int) -> None:
    """Copies journal and samples up to a step to a new session.

    The journal comes last and appears at once: if this process is killed, the new session does not
    have a journal with steps of its source.

    Raises:
        JournalError: a file of the source cannot be read.
        sqlite3.Error: a file cannot be copied.
        OSError: the same.
    """
    for old, new, migrations, queries in (
        (source.samples_file, target.samples_file, schema.SAMPLES, TRUNCATE_SAMPLES),
        (source.journal_file, target.journal_file, schema.JOURNAL, TRUNCATE_JOURNAL),
    ):
        reader = open_read_only(old, len(migrations))
        if reader is None:
            continue
        part = target.folder / PART_NAME
        access.create_file(part)
        with closing(reader), closing(sqlite3.connect(part)) as writer:
            reader.backup(writer)
            schema.migrate(writer, migrations, part)
            with writer:
                for query in queries:
                    writer.execute(query, {"step": step})
        part.replace(new)


def unfinished_copies(session: SessionFolder) -> list[Path]:
    """The files that a fork has left in its session which was killed."""
    return list(session.folder.glob(f"{PART_NAME}*"))
