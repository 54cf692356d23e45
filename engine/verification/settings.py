"""Recomputes the history of settings, which must match each checkpoint and the final settings."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from engine.config.settings import LIVE_SETTINGS, invalid_values
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.journal.logs.command_log import OF_START
from engine.journal.reader import JournalReader
from engine.journal.rows import CommandRow
from engine.kl import next_beta
from engine.metrics import BETA, KL
from engine.session.checkpoints import checkpoint_path, complete_checkpoints, saved_settings
from engine.session.folder import SessionFolder
from engine.verification.databases import RESTORE
from engine.verification.finding import Finding, problem

ADVICE = f"{RESTORE}; if none is wrong, report it with the session's journal.db"
UNKNOWN = object()
"""A value that the journal does not determine."""


class SettingHistory:
    """The values of one setting over the current timeline, from the commands that changed it."""

    def __init__(self, initial: Any) -> None:
        self.initial = initial
        """Before the first change; UNKNOWN if only a checkpoint has it."""
        self.changes: list[tuple[int, Any]] = []
        """First step with the value, and the value, in order of application: by step."""

    def during(self, step: int) -> Any:
        """The value in force during a step; UNKNOWN if the journal does not determine it."""
        count = self._count(step)
        return self.changes[count - 1][1] if count else self.initial

    def before(self, step: int) -> list[Any]:
        """The values that it was set to right before a step, in order."""
        return [new for _, new in self.changes[self._count(step - 1) : self._count(step)]]

    def at_boundary(self, step: int) -> list[Any]:
        """The values between a step and the next, in order."""
        return [self.during(step), *self.before(step + 1)]

    def _count(self, step: int) -> int:
        """The number of changes up to a step."""
        return bisect_right(self.changes, step, key=lambda change: change[0])

    def learn(self, step: int, value: Any) -> None:
        """Adopts the value of a checkpoint if the journal has no earlier one."""
        before = not self.changes or step + 1 < self.changes[0][0]
        if self.initial is UNKNOWN and before:
            self.initial = value


def check_settings(
    session: SessionFolder, database: ReadOnlyDatabase, reader: JournalReader
) -> Iterator[Finding]:
    """Compares the recomputed settings with those that checkpoints, steps and journal recorded."""
    final = reader.meta().settings or {}
    last = _last_recorded(database)
    # After a roll back whose attempt has no step yet, they are those of an abandoned branch.
    constant = final if last is not None else {}
    histories = _histories(_applied(database, reader), constant)
    saved = _saved(session, reader)
    for step, settings in saved.items():
        for key, history in histories.items():
            if key in settings and key != "beta":
                history.learn(step, settings[key])
    wrong = invalid_values({k: v for s in (*saved.values(), final) for k, v in s.items()
                            if k in LIVE_SETTINGS})  # fmt: skip
    recorded = [(f"the checkpoint of step {step}", step, saved[step]) for step in saved]
    if last is not None:
        recorded.append(("the journal's last row", last, final))
    for source, step, settings in recorded:
        for key, value in settings.items():
            if key not in histories or key == "beta" or key in wrong:
                continue
            possible = histories[key].at_boundary(step)
            if not any(_equal(value, other) for other in possible):
                text = f"{source} has {key} = {value}, its history gives {possible[-1]}"
                yield problem("settings", text, ADVICE)
    if "beta" not in wrong:
        yield from _check_beta(session, reader, histories, recorded)


def _check_beta(
    session: SessionFolder,
    reader: JournalReader,
    histories: dict[str, SettingHistory],
    recorded: list[tuple[str, int, dict[str, Any]]],
) -> Iterator[Finding]:
    """Beta also changes after each step, by the controller, from the KL of that step."""
    batch = session.config().rollout.batch_size
    betas, kls = dict(reader.metrics.series(BETA)), dict(reader.metrics.series(KL))
    boundaries: dict[int, list[Any]] = {}
    """Step → the values of beta before the next one, in order."""
    for step, beta in betas.items():
        names = ("controller", "target", "horizon", "beta_min", "beta_max")
        values = {name: histories[name].during(step) for name in names}
        kl = kls.get(step)
        if beta is None or kl is None or UNKNOWN in values.values():
            continue
        by_controller = next_beta(SimpleNamespace(beta=beta, **values), kl, batch)
        boundaries[step] = [by_controller, *histories["beta"].before(step + 1)]
        following = betas.get(step + 1)
        if following is not None and not _equal(following, boundaries[step][-1]):
            text = f"step {step + 1} has beta = {following}, its history gives "
            yield problem("settings", f"{text}{boundaries[step][-1]}", ADVICE)
            return  # what follows differs for the same reason
    for source, step, settings in recorded:
        value, possible = settings.get("beta"), boundaries.get(step, [])
        if value is not None and possible and not any(_equal(value, b) for b in possible):
            text = f"{source} has beta = {value}, its history gives {possible[-1]}"
            yield problem("settings", text, ADVICE)


def _applied(database: ReadOnlyDatabase, reader: JournalReader) -> list[CommandRow]:
    """The commands in effect that changed settings, in the order of application."""
    order = "applied_step, ended"
    if database.version >= schema.COMMANDS_ARE_NUMBERED:
        order = "applied_step, applied_seq"
    rows = database.rows(
        f"SELECT id FROM commands WHERE status = 'applied' AND live ORDER BY {order}"  # noqa: S608 - constants
    )
    position = {row[0]: number for number, row in enumerate(rows)}
    found = [c for c in reader.commands() if c.id in position and c.changes]
    return sorted(found, key=lambda c: position[c.id])


def _histories(commands: list[CommandRow], constant: dict[str, Any]) -> dict[str, SettingHistory]:
    """The history of every live setting; one that never changed has its value in `constant`."""
    histories = {key: SettingHistory(constant.get(key, UNKNOWN)) for key in LIVE_SETTINGS}
    for command in commands:
        for change in command.changes:
            history = histories.get(change.key)
            if history is None:  # of another version
                continue
            if not history.changes:
                history.initial = UNKNOWN if command.id.startswith(OF_START) else change.old
            history.changes.append((command.applied_step or 0, change.new))
    return histories


def _saved(session: SessionFolder, reader: JournalReader) -> dict[int, dict[str, Any]]:
    """The settings in each checkpoint of the timeline, by step."""
    known = {row.step for row in reader.checkpoints(("complete", "written"))}
    return {
        step: saved_settings(checkpoint_path(session.checkpoints, step))
        for step in complete_checkpoints(session.checkpoints, lenient=True)
        if step in known
    }


def _last_recorded(database: ReadOnlyDatabase) -> int | None:
    """The last step if the journal's settings are its; None after a start without a step."""
    rows = database.rows(
        "SELECT step, attempt = (SELECT max(attempt) FROM attempts) FROM steps "
        "ORDER BY step DESC LIMIT 1"
    )
    return int(rows[0][0]) if rows and rows[0][1] else None


def _equal(a: Any, b: Any) -> bool:
    if a is UNKNOWN or b is UNKNOWN:
        return True
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    # Processors differ in the last bit of what a controller computes.
    return math.isclose(a, b, rel_tol=1e-9) if numbers else bool(a == b)
