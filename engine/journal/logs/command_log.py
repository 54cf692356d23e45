"""The commands in the journal, with their status and the changes they made.

The status of a command is `queued → accepted → applied at step S`, or `rejected: reason`. Commands
are ordered by sequence numbers, never by wall clock, which may be set back.
"""

import json
import sqlite3
import time
from typing import Any

import msgspec

from engine.config.settings import SettingChange, have_effect
from engine.errors import JournalError
from engine.journal.json_values import decoded, finite
from engine.journal.logs.event_log import EventLog
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import Note, SetSetting, Undo
from engine.protocol.rank_messages import RepeatedChange

OF_START = "start-"
"""Prefix of the ids of commands that stand for the overrides of a start. Their old value is that of
a crashed attempt's last step, which the start abandons."""


class CommandLog:
    """Writes and reads commands. Each command also has an event."""

    def __init__(self, db: sqlite3.Connection, events: EventLog) -> None:
        """Reads the journal's last sequence numbers once, not again for each command."""
        self._db = db
        self._events = events
        self._seq, self._applied_seq = db.execute(
            "SELECT ifnull(max(seq), 0), ifnull(max(applied_seq), 0) FROM commands"
        ).fetchone()
        self._earlier: tuple[int, int] = (0, 0)
        """An attempt, and the last step with a change of the attempts before it."""

    def changes_after(self, step: int) -> list[RepeatedChange]:
        """The commands after a step that changed settings, in the order of application.

        A resume applies their changes again.
        """
        rows = self._db.execute(
            "SELECT applied_step, command, changes FROM commands "
            "WHERE status = 'applied' AND live AND applied_step > ? AND changes <> '[]' "
            "ORDER BY applied_step, applied_seq",
            (step,),
        ).fetchall()
        return [
            RepeatedChange(
                step=applied, command=command, changes=decoded(text, list[SettingChange])
            )
            for applied, command, text in rows
        ]

    def record(
        self,
        command_id: str,
        command: str,
        args: dict[str, Any],
        who: str,
        *,
        rejected: bool = False,
    ) -> bool:
        """Writes a queued command and its event. Returns False if the id exists already.

        Args:
            command_id: of the command.
            command: its name.
            args: its arguments.
            who: the operator who sent it.
            rejected: whether :meth:`reject` follows; a rejected note is not shown as a note.
        """
        self._seq += 1
        with self._db:
            new = self._db.execute(
                "INSERT OR IGNORE INTO commands "
                "(id, command, args, who, status, queued, attempt, changes, seq) "
                "VALUES (?, ?, ?, ?, 'queued', ?, ?, '[]', ?)",
                (
                    command_id,
                    command,
                    json.dumps(finite(args)),
                    who,
                    time.time(),
                    self._events.attempt,
                    self._seq,
                ),
            ).rowcount
            if new and command == Note.name() and not rejected:
                self._events.write("note", {"id": command_id, "who": who, "text": args["text"]})
            elif new:
                self._events.write("command", {"id": command_id})
        return bool(new)

    def is_recorded_as(self, command_id: str, command: str, args: dict[str, Any]) -> bool:
        """Whether the journal has the same command under this id."""
        row = self._db.execute(
            "SELECT command, args FROM commands WHERE id = ?", (command_id,)
        ).fetchone()
        return row is not None and (row[0], json.loads(row[1])) == (command, finite(args))

    def accept(self, command_id: str) -> None:
        """Marks a command as accepted: it will be executed at the next step boundary."""
        with self._db:
            self._db.execute(
                "UPDATE commands SET status = 'accepted', accepted = ? WHERE id = ?",
                (time.time(), command_id),
            )

    def apply(
        self,
        command_id: str,
        step: int,
        changes: list[SettingChange],
        result: dict[str, Any] | None = None,
    ) -> None:
        """Marks a command as applied.

        Args:
            command_id: of the command.
            step: the first step with the command in effect.
            changes: the settings it changed.
            result: of a probe.
        """
        self._applied_seq += 1
        with self._db:
            self._db.execute(
                "UPDATE commands SET status = 'applied', ended = ?, applied_step = ?, "
                "attempt = ?, changes = ?, result = ?, applied_seq = ? WHERE id = ?",
                (time.time(), step, self._events.attempt, msgspec.json.encode(changes).decode(),
                 json.dumps(finite(result or {})), self._applied_seq, command_id),
            )  # fmt: skip
            if changes and step < self._last_earlier_change():
                self._override_earlier(step, {c.key for c in changes})

    def record_change(self, command_id: str, step: int, change: SettingChange, who: str) -> None:
        """Records a change that no client asked for as a command `set` that was applied.

        Args:
            command_id: names the change; it is recorded once.
            step: the first step with the change in effect.
            change: the change.
            who: as whose command it is shown.
        """
        args = {"key": change.key, "value": change.new}
        self.record(command_id, SetSetting.name(), args, who)
        self.apply(command_id, step, [change])

    def _last_earlier_change(self) -> int:
        """An upper bound on the steps with commands of earlier attempts; read once."""
        attempt = self._events.attempt
        if self._earlier[0] != attempt:
            (last,) = self._db.execute(
                "SELECT ifnull(max(applied_step), 0) FROM commands WHERE attempt < ?", (attempt,)
            ).fetchone()
            self._earlier = attempt, last
        return self._earlier[1]

    def _override_earlier(self, step: int, keys: set[str]) -> None:
        """Drops earlier attempts' changes of these settings after this step.

        They would otherwise be applied again after the next crash and override the new change. If
        the same command also changed other settings, those changes stay. Changes at this step
        itself stay, too: they were applied again before the new command, and `undo` and the next
        resume must find them in that order.
        """
        rows = self._db.execute(
            "SELECT id, changes FROM commands "
            "WHERE status = 'applied' AND live AND attempt < ? AND applied_step > ?",
            (self._events.attempt, step),
        ).fetchall()
        for earlier, text in rows:
            changes = decoded(text, list[SettingChange])
            kept = [c for c in changes if c.key not in keys]
            if changes and not kept:
                self._db.execute("UPDATE commands SET live = 0 WHERE id = ?", (earlier,))
            elif len(kept) < len(changes):
                values = (msgspec.json.encode(kept).decode(), earlier)
                self._db.execute("UPDATE commands SET changes = ? WHERE id = ?", values)

    def reject(self, command_id: str, reason: str) -> None:
        """Marks a command as rejected."""
        with self._db:
            self._db.execute(
                "UPDATE commands SET status = 'rejected', ended = ?, reason = ? WHERE id = ?",
                (time.time(), reason, command_id),
            )

    def reject_unfinished(self, reason: str) -> None:
        """Rejects all commands still queued or accepted, such as those of a dead engine."""
        with self._db:
            self._db.execute(
                "UPDATE commands SET status = 'rejected', ended = ?, reason = ? "
                "WHERE status IN ('queued', 'accepted')",
                (time.time(), reason),
            )

    def reply(self, command_id: str) -> CommandReply:
        """The current status of a command. Raises JournalError if the id is unknown."""
        row = self._db.execute(
            "SELECT status, applied_step, reason, changes, result FROM commands WHERE id = ?",
            (command_id,),
        ).fetchone()
        if row is None:
            raise JournalError(f"no command {command_id}")
        status, step, reason, changes, result = row
        return CommandReply(
            id=command_id,
            status=status,
            step=step,
            reason=reason or "",
            changes=decoded(changes, list[SettingChange]),
            result=decoded(result or "{}", dict[str, Any]),
        )

    def undoable(self, step: int) -> list[list[SettingChange]]:
        """The changes in effect at a step that `undo` can revert, in the order of application."""
        rows = self._db.execute(
            "SELECT command, changes FROM commands "
            "WHERE status = 'applied' AND live AND applied_step <= ? AND changes <> '[]' "
            "ORDER BY applied_step, applied_seq",
            (step,),
        ).fetchall()
        stack: list[list[SettingChange]] = []
        for command, text in rows:
            changes = decoded(text, list[SettingChange])
            if command == Undo.name():
                del stack[-1:]
            elif have_effect(changes):
                stack.append(changes)
        return stack
