"""The schemas of a session's databases: an ordered list of migrations for each of them.

A released migration is never edited; a change is a new migration at the end. SQLite's
`user_version` is the number of migrations applied to a file. The holder of the session's lock
migrates the journal and the samples. The first client that writes labels migrates those.
"""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from engine.errors import JournalError

JOURNAL: list[str] = [
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE attempts (
        attempt INTEGER PRIMARY KEY, from_step INTEGER NOT NULL, fresh INTEGER NOT NULL,
        started REAL NOT NULL, ended REAL, pid INTEGER NOT NULL, host TEXT NOT NULL,
        version TEXT NOT NULL
    );
    -- The current timeline. Rows that a later attempt replaces move to the tables named *_past.
    CREATE TABLE steps (step INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, time REAL NOT NULL);
    CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
    CREATE TABLE metrics (
        name INTEGER NOT NULL, step INTEGER NOT NULL, value REAL, PRIMARY KEY (name, step)
    ) WITHOUT ROWID;
    CREATE TABLE steps_past (
        attempt INTEGER NOT NULL, step INTEGER NOT NULL, time REAL NOT NULL,
        PRIMARY KEY (attempt, step)
    ) WITHOUT ROWID;
    CREATE TABLE metrics_past (
        name INTEGER NOT NULL, attempt INTEGER NOT NULL, step INTEGER NOT NULL, value REAL,
        PRIMARY KEY (name, attempt, step)
    ) WITHOUT ROWID;
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, attempt INTEGER NOT NULL,
        step INTEGER NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL
    );
    CREATE TABLE commands (
        id TEXT PRIMARY KEY, command TEXT NOT NULL, args TEXT NOT NULL, who TEXT NOT NULL,
        status TEXT NOT NULL, queued REAL NOT NULL, accepted REAL, ended REAL,
        attempt INTEGER NOT NULL, applied_step INTEGER, reason TEXT, changes TEXT NOT NULL,
        result TEXT,
        live INTEGER NOT NULL DEFAULT 1
    ) WITHOUT ROWID;
    CREATE TABLE telemetry (time REAL PRIMARY KEY, data TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE checkpoints (
        step INTEGER NOT NULL, attempt INTEGER NOT NULL, time REAL NOT NULL,
        size INTEGER NOT NULL, score REAL, kl REAL, status TEXT NOT NULL,
        PRIMARY KEY (step, attempt)
    ) WITHOUT ROWID;
    """,
    # The wall clock may be set back, so commands are ordered by number: `seq` in the order of
    # arrival, `applied_seq` in the order of application. Commands of an older journal are numbered
    # by their events; the engine applied them in that order.
    """
    ALTER TABLE commands ADD COLUMN seq INTEGER;
    ALTER TABLE commands ADD COLUMN applied_seq INTEGER;
    WITH arrivals AS (
        SELECT json_extract(data, '$.id') AS id, min(id) AS event FROM events
        WHERE kind IN ('command', 'note') GROUP BY 1
    ), numbered AS (
        SELECT commands.id, row_number() OVER (
            ORDER BY event IS NULL, event, queued, commands.id
        ) AS number
        FROM commands LEFT JOIN arrivals ON arrivals.id = commands.id
    )
    UPDATE commands SET seq = number, applied_seq = iif(status = 'applied', number, NULL)
    FROM numbered WHERE numbered.id = commands.id;
    """,
    # Whether an operator saved it, so that it stays until somebody deletes it.
    """
    ALTER TABLE checkpoints ADD COLUMN kept INTEGER NOT NULL DEFAULT 0;
    """,
]

COMMANDS_ARE_NUMBERED = 2
"""The journal's version from which commands have `seq` and `applied_seq`."""
CHECKPOINTS_ARE_KEPT = 3
"""The journal's version from which checkpoints have `kept`."""

SAMPLES: list[str] = [
    """
    CREATE TABLE samples (
        step INTEGER NOT NULL, idx INTEGER NOT NULL, attempt INTEGER NOT NULL,
        prompt TEXT NOT NULL, response TEXT NOT NULL, score REAL, kl REAL,
        length INTEGER NOT NULL, ended INTEGER NOT NULL, parts TEXT NOT NULL,
        PRIMARY KEY (step, idx)
    );
    CREATE TABLE samples_past (
        step INTEGER NOT NULL, idx INTEGER NOT NULL, attempt INTEGER NOT NULL,
        prompt TEXT NOT NULL, response TEXT NOT NULL, score REAL, kl REAL,
        length INTEGER NOT NULL, ended INTEGER NOT NULL, parts TEXT NOT NULL,
        PRIMARY KEY (attempt, step, idx)
    );
    CREATE TABLE arrays (
        step INTEGER NOT NULL, idx INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (step, idx)
    ) WITHOUT ROWID;
    """,
    # Responses to held-out prompts. `idx` is the same at every evaluation of a prompt.
    """
    CREATE TABLE evaluated (
        step INTEGER NOT NULL, idx INTEGER NOT NULL, attempt INTEGER NOT NULL,
        prompt TEXT NOT NULL, response TEXT NOT NULL, score REAL, kl REAL,
        length INTEGER NOT NULL, ended INTEGER NOT NULL, parts TEXT NOT NULL,
        PRIMARY KEY (step, idx)
    );
    CREATE TABLE evaluated_past (
        step INTEGER NOT NULL, idx INTEGER NOT NULL, attempt INTEGER NOT NULL,
        prompt TEXT NOT NULL, response TEXT NOT NULL, score REAL, kl REAL,
        length INTEGER NOT NULL, ended INTEGER NOT NULL, parts TEXT NOT NULL,
        PRIMARY KEY (attempt, step, idx)
    );
    """,
    # Of the weights that sampled a response: the step after whose update the policy had them.
    """
    ALTER TABLE samples ADD COLUMN weights_version INTEGER;
    ALTER TABLE samples_past ADD COLUMN weights_version INTEGER;
    ALTER TABLE evaluated ADD COLUMN weights_version INTEGER;
    ALTER TABLE evaluated_past ADD COLUMN weights_version INTEGER;
    """,
    # Start and end of each reply of the environment in the response, as JSON; NULL without one.
    """
    ALTER TABLE samples ADD COLUMN replies TEXT;
    ALTER TABLE samples_past ADD COLUMN replies TEXT;
    ALTER TABLE evaluated ADD COLUMN replies TEXT;
    ALTER TABLE evaluated_past ADD COLUMN replies TEXT;
    """,
    # Prompt and response of a conversation with an environment as messages, as JSON; else NULL. Not
    # of responses to held-out prompts, which are not judged.
    """
    ALTER TABLE samples ADD COLUMN messages TEXT;
    ALTER TABLE samples_past ADD COLUMN messages TEXT;
    ALTER TABLE evaluated ADD COLUMN messages TEXT;
    ALTER TABLE evaluated_past ADD COLUMN messages TEXT;
    """,
    # Scores of the policy's turns by the sources that gave them, as JSON; else NULL.
    """
    ALTER TABLE samples ADD COLUMN turn_scores TEXT;
    ALTER TABLE samples_past ADD COLUMN turn_scores TEXT;
    ALTER TABLE evaluated ADD COLUMN turn_scores TEXT;
    ALTER TABLE evaluated_past ADD COLUMN turn_scores TEXT;
    """,
]

EVALUATED_ARE_KEPT = 2
"""The version of samples.db from which it holds the responses to held-out prompts."""
ADDED_COLUMNS = {"weights_version": 3, "replies": 4, "messages": 5, "turn_scores": 6}
"""Each column that was added to the tables of responses, and the version of samples.db since which
they have it."""

SAMPLE_COLUMNS = (
    "step, idx, attempt, prompt, response, score, kl, length, ended, parts, weights_version, "
    "replies, messages, turn_scores"
)
"""The columns that both tables of responses have, with and without `_past`."""


def sample_columns(version: int, missing: str = "") -> str:
    """SAMPLE_COLUMNS in a samples.db of a version.

    Args:
        version: its number of migrations.
        missing: what takes the place of a column that it lacks, such as `, NULL AS {}`; by default
            nothing.
    """
    columns = SAMPLE_COLUMNS
    for name, since in ADDED_COLUMNS.items():
        if version < since:
            columns = columns.replace(f", {name}", missing.format(name))
    return columns


LABELS: list[str] = [
    """
    CREATE TABLE judgements (
        attempt INTEGER NOT NULL, step INTEGER NOT NULL, idx INTEGER NOT NULL,
        prompt TEXT NOT NULL, response TEXT NOT NULL,
        label TEXT CHECK (label IN ('good', 'bad', 'hack')), note TEXT,
        who TEXT NOT NULL, time REAL NOT NULL,
        PRIMARY KEY (attempt, step, idx)
    ) WITHOUT ROWID;
    -- Attempt, step and index are NULL for a response of the reference.
    CREATE TABLE preferences (
        prompt TEXT NOT NULL, chosen TEXT NOT NULL, rejected TEXT NOT NULL,
        chosen_attempt INTEGER, chosen_step INTEGER, chosen_idx INTEGER,
        rejected_attempt INTEGER, rejected_step INTEGER, rejected_idx INTEGER,
        who TEXT NOT NULL, time REAL NOT NULL,
        PRIMARY KEY (prompt, chosen, rejected)
    ) WITHOUT ROWID;
    """,
    # The order in which rows of both tables were written: the wall clock may be set back.
    """
    ALTER TABLE judgements ADD COLUMN seq INTEGER;
    ALTER TABLE preferences ADD COLUMN seq INTEGER;
    CREATE TEMP TABLE times AS SELECT time, row_number() OVER (ORDER BY time) AS seq
        FROM (SELECT time FROM judgements UNION SELECT time FROM preferences);
    UPDATE judgements SET seq = t.seq FROM times t WHERE t.time = judgements.time;
    UPDATE preferences SET seq = t.seq FROM times t WHERE t.time = preferences.time;
    DROP TABLE times;
    """,
]

JUDGEMENTS_ARE_NUMBERED = 2
"""The version of labels.db from which judgements and preferences have `seq`."""


def migrate(db: sqlite3.Connection, migrations: list[str], path: Path) -> None:
    """Applies the missing migrations to a file, in one transaction.

    Args:
        db: a writable connection to the file.
        migrations: all migrations of this kind of file.
        path: of the file, for errors.

    Raises:
        JournalError: the file was written by a newer version of this software.
    """
    version = schema_version(db)
    if version > len(migrations):
        raise JournalError(f"{path} was written by a newer rlhf-tui; upgrade to read it")
    if version == len(migrations):
        return
    with db:
        # Read again under the lock: another client may have migrated the file in the meantime.
        db.execute("BEGIN IMMEDIATE")
        version = schema_version(db)
        for number, script in enumerate(migrations[version:], start=version + 1):
            for statement in _statements(script):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")


def _statements(script: str) -> Iterator[str]:
    """Splits a script into statements; `executescript` would commit the open transaction."""
    statement = ""
    for part in script.split(";"):
        statement += f"{part};"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def schema_version(db: sqlite3.Connection) -> int:
    """The number of migrations applied to a file."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])
