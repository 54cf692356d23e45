"""Reads the journal of a live, finished, crashed or archived session.

Each query is a short transaction of its own, so that a reader does not delay the checkpoints of the
writer's WAL.
"""

import functools
import json
from typing import Any, Self

import msgspec

from engine.config.settings import SettingChange
from engine.examined import examined
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase, limit
from engine.journal.history.meta import read_meta_at
from engine.journal.history.views import journal_views, views_of
from engine.journal.json_values import decoded
from engine.journal.metric_reader import MetricReader, last_step
from engine.journal.rows import (
    AttemptRow,
    CheckpointRow,
    CommandEvent,
    CommandRow,
    EventRow,
    ForkOrigin,
    ProbeResponse,
    SessionMeta,
    decode_payload,
)
from engine.journal.samples import SampleReader
from engine.metrics import SCORES
from engine.protocol.client_messages import Telemetry
from engine.protocol.rank_messages import REWARD_CHANGED
from engine.session.checkpoints import checkpoint_path, saved_settings
from engine.session.folder import SessionFolder
from engine.session.states import LIVE_STATES

REFERENCE_PROBES = """
SELECT json_extract(result, '$.reference'), applied_step FROM commands
WHERE command = 'probe' AND status = 'applied' AND json_extract(args, '$.text') = ?
"""
RAISED_ALERTS = """
SELECT events.step, json_extract(data, '$.rule'),
    coalesce(json_extract(data, '$.began'), events.step) FROM events
JOIN steps ON steps.step = events.step AND steps.attempt = events.attempt
WHERE kind = 'alert' AND json_extract(data, '$.metric') IS NOT NULL
"""
"""Alerts without a metric are notices, such as that a rule cannot be evaluated."""
REWARD_CHANGES = """
SELECT DISTINCT events.step FROM events
JOIN steps ON steps.step = events.step + 1 AND steps.attempt = events.attempt
WHERE kind = 'alert' AND json_extract(data, '$.rule') = ? ORDER BY events.step
"""
"""Only those of attempts that took the next step of the timeline."""
EVENT_COLUMNS = "id, time, attempt, step, kind, data"
COMMAND_COLUMNS = """
id, command, args, who, status, queued, accepted, ended, attempt, applied_step, reason, changes,
result, live
"""
COMMANDS = f"SELECT {COMMAND_COLUMNS} FROM commands"  # noqa: S608 - constants


class JournalReader:
    """Reads the journal of a session. A session without a journal reads as empty."""

    def __init__(self, session: SessionFolder, database: ReadOnlyDatabase | None = None) -> None:
        """Opens the journal. Samples are opened when they are first read.

        Args:
            session: whose journal to read.
            database: the journal, if it is already open. It is closed with the reader.

        Raises:
            JournalError: it cannot be read, or a newer version wrote it.
        """
        self.session = session
        self._db = database or ReadOnlyDatabase(
            session.journal_file, schema.JOURNAL, views_of(session, journal_views)
        )
        self.metrics = MetricReader(session, self._db)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._db.close()
        if "samples" in self.__dict__:
            self.samples.close()

    @functools.cached_property
    def samples(self) -> SampleReader:
        """Reads the session's responses, which are in another file. Raises JournalError."""
        return SampleReader(self.session)

    def meta(self) -> SessionMeta:
        """The current state and settings, as the supervisor last recorded them.

        At a moment of the history they are derived from events and commands.
        """
        rows = self._db.rows("SELECT key, value FROM meta")
        values: dict[str, str] = dict(rows)
        meta = SessionMeta(
            state=decoded(values.get("state", '"starting"'), str),
            total_steps=decoded(values.get("total_steps", "0"), int),
            settings=decoded(values.get("settings", "null"), dict[str, Any] | None),
            message=decoded(values.get("message", "null"), str | None) or "",
            pause_reason=decoded(values.get("pause_reason", "null"), str | None),
            deadline=decoded(values.get("deadline", "null"), float | None),
            exit_code=decoded(values.get("exit_code", "null"), int | None),
            best_metric=decoded(values.get("best_metric", "null"), str | None),
        )
        position = self.session.position
        if position is None:
            return meta
        return read_meta_at(self._db, position, meta)

    def state(self) -> str:
        """The session's state; `crashed` if the recorded state is live but there is no engine.

        A new session is `starting` until its first engine runs.
        """
        if (position := self.session.position) is not None:
            state = self.meta().state
            return "crashed" if state in LIVE_STATES and not position.live else state
        # The lock is tested before and after reading: an engine may end in between.
        live = self.session.is_live()
        state = self.meta().state
        if state in LIVE_STATES and not live and not self.session.is_live():
            state = self.meta().state
            dead = state in LIVE_STATES and not (state == "starting" and self._is_being_started())
            return "crashed" if dead else state
        return state

    def _is_being_started(self) -> bool:
        begun = max((attempt.started for attempt in self.attempts()), default=0.0)
        return self.session.is_being_started(begun)

    def last_step(self) -> int:
        """The last completed step, 0 before the first."""
        return last_step(self.session, self._db)

    def settings_after_last_step(self) -> dict[str, Any]:
        """The live settings in force after the last step; empty before the first.

        Until a fork has loaded its checkpoint, its journal does not have them.
        """
        settings, step = self.meta().settings, self.last_step()
        if settings is None and step:
            return saved_settings(checkpoint_path(self.session.checkpoints, step))
        return settings or {}

    def attempts(self) -> list[AttemptRow]:
        """All attempts, in order."""
        rows = self._db.rows(
            "SELECT attempt, from_step, fresh, started, ended, pid, host, version "
            "FROM attempts ORDER BY attempt"
        )
        return [
            AttemptRow(
                attempt=attempt, from_step=from_step, fresh=bool(fresh), started=started,
                ended=ended, pid=pid, host=host, version=version,
            )
            for attempt, from_step, fresh, started, ended, pid, host, version in rows
        ]  # fmt: skip

    def fork_origin(self) -> ForkOrigin | None:
        """Where the session was forked from; None if it is not a fork.

        A fork of a fork has the events of both; the last one is its own.
        """
        rows = self._db.rows(
            "SELECT attempt, json_extract(data, '$.fork.from'), json_extract(data, '$.fork.step') "
            "FROM events WHERE kind = 'attempt' AND json_extract(data, '$.fork') IS NOT NULL "
            "ORDER BY id DESC LIMIT 1"
        )
        return ForkOrigin(*rows[0]) if rows else None

    def has_steps(self, attempt: int) -> bool:
        """Whether this attempt or a later one has completed a step, abandoned ones included."""
        found = self._db.value(
            "SELECT 1 WHERE EXISTS (SELECT 1 FROM steps WHERE attempt >= :attempt) "
            "OR EXISTS (SELECT 1 FROM steps_past WHERE attempt >= :attempt)",
            {"attempt": attempt},
        )
        return found is not None

    def last_telemetry(self) -> Telemetry | None:
        """The newest telemetry; None if there is none or it is of another version."""
        data = self._db.value("SELECT data FROM telemetry ORDER BY time DESC LIMIT 1")
        try:
            return None if data is None else msgspec.json.decode(data, type=examined(Telemetry))
        except (msgspec.DecodeError, RecursionError):
            return None

    def events(self, last: int | None = None, after: int = 0) -> list[EventRow]:
        """Events, oldest first; the event of a command has the command with its current status.

        Args:
            last: maximum number of events, the newest ones; None for all.
            after: only events with a greater id.
        """
        rows = self._db.rows(
            f"SELECT {EVENT_COLUMNS} FROM events WHERE id > ? ORDER BY id DESC LIMIT ?",  # noqa: S608 - constants
            (after, limit(last)),
        )
        events = [_event(row) for row in reversed(rows)]
        ids = [e.payload.id for e in events if isinstance(e.payload, CommandEvent)]
        commands = self._commands_of(ids) if ids else {}
        return [
            msgspec.structs.replace(e, command=commands.get(e.payload.id))
            if isinstance(e.payload, CommandEvent)
            else e
            for e in events
        ]

    def reward_changes(self) -> list[int]:
        """The steps of the current timeline after which scores come from another reward, sorted."""
        rows = self._db.rows(REWARD_CHANGES, (REWARD_CHANGED,))
        return [step for (step,) in rows]

    def raised_alerts(self) -> dict[int, dict[str, int]]:
        """The alerts of guard rails, by step of the current timeline and rule.

        The value is the step of the rule's first alert since its condition had last cleared.
        """
        raised: dict[int, dict[str, int]] = {}
        for step, rule, began in self._db.rows(RAISED_ALERTS):
            raised.setdefault(step, {})[rule] = began
        return raised

    def last_alert(self) -> EventRow | None:
        """The newest alert; None if there was none."""
        rows = self._db.rows(
            f"SELECT {EVENT_COLUMNS} FROM events WHERE kind = 'alert' ORDER BY id DESC LIMIT 1"  # noqa: S608 - constants
        )
        return _event(rows[0]) if rows else None

    def commands(self) -> list[CommandRow]:
        """Every command with its status and, once applied, its changes, in order of arrival."""
        return list(self.numbered_commands().values())

    def numbered_commands(self, after: int = 0) -> dict[int, CommandRow]:
        """Commands by their numbers, which are in order of arrival and may have gaps.

        Args:
            after: only commands with a greater number.
        """
        numbered = self._db.version >= schema.COMMANDS_ARE_NUMBERED
        number = "seq" if numbered else "row_number() OVER (ORDER BY queued)"
        rows = self._db.rows(
            f"SELECT * FROM (SELECT {COMMAND_COLUMNS}, {number} AS number FROM commands) "  # noqa: S608 - constants
            "WHERE number > ? ORDER BY number",
            (after,),
        )
        return {row[-1]: _command(row[:-1]) for row in rows}

    def command_count(self) -> int:
        """The number of commands."""
        return self._db.value("SELECT count(*) FROM commands") or 0

    def _commands_of(self, ids: list[str]) -> dict[str, CommandRow]:
        """The commands of some events, by id: reading few events must not read all commands."""
        rows = self._db.rows(
            f"{COMMANDS} WHERE id IN (SELECT value FROM json_each(?))",  # noqa: S608 - a constant
            (json.dumps(ids),),
        )
        return {row[0]: _command(row) for row in rows}

    def command(self, command_id: str) -> CommandRow | None:
        """One command; None if the id is unknown."""
        rows = self._db.rows(f"{COMMANDS} WHERE id = ?", (command_id,))
        return _command(rows[0]) if rows else None

    def last_reference_probe(self, prompt: str) -> ProbeResponse | None:
        """The reference's response to a prompt in the last probe with that prompt.

        Returns:
            The response, with the step of the probe; None if there was no such probe.
        """
        return next(iter(self.reference_probes(prompt, last=1)), None)

    def reference_probes(self, prompt: str, last: int | None = None) -> list[ProbeResponse]:
        """The reference's responses to a prompt in the probes with that prompt, newest first."""
        order = "applied_seq" if self._db.version >= schema.COMMANDS_ARE_NUMBERED else "ended"
        rows = self._db.rows(
            f"{REFERENCE_PROBES} ORDER BY {order} DESC LIMIT ?", (prompt, limit(last))
        )
        return [
            msgspec.structs.replace(decoded(result, ProbeResponse), step=step)
            for result, step in rows
            if result is not None
        ]

    def checkpoints(
        self, statuses: tuple[str, ...] = ("complete", "superseded")
    ) -> list[CheckpointRow]:
        """Checkpoints by step; by default all complete ones, including abandoned branches."""
        kept = "kept" if self._db.version >= schema.CHECKPOINTS_ARE_KEPT else "0"
        rows = self._db.rows(
            f"SELECT step, attempt, time, size, score, kl, status, {kept} FROM checkpoints "  # noqa: S608 - constants
            "ORDER BY step, attempt"
        )
        found = (
            CheckpointRow(step, attempt, time, size, score, kl, status, bool(kept))
            for step, attempt, time, size, score, kl, status, kept in rows
        )
        return [c for c in found if c.status in statuses]

    def best_checkpoint(self, metric: str) -> int | None:
        """The step of the checkpoint with the highest value of a metric; the newest one on a tie.

        None if no checkpoint of the current timeline has a value. Scores of an earlier reward are
        not compared.
        """
        changes = self.reward_changes() if metric in SCORES else []
        found: list[tuple[float, int]] = []
        for checkpoint in self.checkpoints(("complete",)):
            if changes and checkpoint.step <= changes[-1]:
                continue
            value = self.metrics.value_at(metric, checkpoint.step)
            if value is not None:
                found.append((value, checkpoint.step))
        return max(found)[1] if found else None


def _event(row: tuple[Any, ...]) -> EventRow:
    """Builds a row from :data:`EVENT_COLUMNS`, without the command."""
    event, time, attempt, step, kind, data = row
    return EventRow(
        event=event, time=time, attempt=attempt, step=step, kind=kind,
        payload=decode_payload(kind, data), data=data,
    )  # fmt: skip


def _command(row: tuple[Any, ...]) -> CommandRow:
    """Builds a row from :data:`COMMAND_COLUMNS`."""
    (
        command_id, command, args, who, status, queued, accepted, ended, attempt, applied_step,
        reason, changes, result, live,
    ) = row  # fmt: skip
    return CommandRow(
        id=command_id, command=command, args=decoded(args, dict[str, Any]), who=who, status=status,
        queued=queued, accepted=accepted, ended=ended, attempt=attempt,
        applied_step=applied_step, reason=reason,
        changes=decoded(changes, list[SettingChange]),
        result=decoded(result or "{}", dict[str, Any]), live=bool(live),
    )  # fmt: skip
