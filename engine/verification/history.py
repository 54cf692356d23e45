"""Checks steps and commands in the journal: no gaps, no duplicates, every command ended."""

from collections.abc import Iterator
from itertools import pairwise

from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.journal.logs.command_log import OF_START
from engine.journal.reader import JournalReader
from engine.journal.rows import AttemptRow, CommandRow
from engine.protocol.commands import COMMANDS, Command, Note, Probe, SettingCommand, Undo
from engine.session.states import ENDED_STATES
from engine.verification.databases import RESTORE
from engine.verification.finding import Finding, listed, note, problem

UNFINISHED = ("queued", "accepted")


def check_steps(database: ReadOnlyDatabase, attempts: list[AttemptRow]) -> Iterator[Finding]:
    """Checks the rows of the current timeline.

    Args:
        database: the journal.
        attempts: all of the session, in order.
    """
    rows: list[tuple[int, int]] = database.rows("SELECT step, attempt FROM steps ORDER BY step")
    steps = [step for step, _ in rows]
    first = attempts[0].from_step + 1 if attempts else 1
    missing = [n for a, b in pairwise([first - 1, *steps]) for n in range(a + 1, b)]
    if missing:
        yield problem("steps", f"the journal has no row for steps {listed(missing)}", RESTORE)
    known = {attempt.attempt for attempt in attempts}
    unknown = [step for step, attempt in rows if attempt not in known]
    if unknown:
        yield problem("steps", f"steps {listed(unknown)} belong to no attempt", RESTORE)
    newest = 0
    for step, attempt in rows:
        if attempt < newest:
            text = f"step {step} is of attempt {attempt}, after steps of attempt {newest}"
            yield problem("steps", text, RESTORE)
            break
        newest = attempt
    measured = {s for (s,) in database.rows("SELECT DISTINCT step FROM metrics")}
    bare = [step for step in steps if step not in measured]
    if bare:
        yield problem("steps", f"steps {listed(bare)} have no metrics", RESTORE)
    loose = sorted(measured - set(steps) - {0})  # an evaluation before the first step is of step 0
    if loose:
        yield problem(
            "steps", f"there are metrics of steps without a row: {listed(loose)}", RESTORE
        )
    twice = database.rows(
        "SELECT step FROM steps JOIN steps_past USING (attempt, step) ORDER BY step"
    )
    if twice:
        text = f"steps {listed(s for (s,) in twice)} are on the timeline and on an abandoned branch"
        yield problem("steps", text, RESTORE)


def check_commands(
    database: ReadOnlyDatabase, reader: JournalReader, resume: str, state: str | None
) -> Iterator[Finding]:
    """Checks that each command has its event, and an effect or a reason for its rejection.

    Args:
        database: the journal.
        reader: of the same session.
        resume: the command that resumes the session, for advice.
        state: of the session, read before the commands; None if an engine may still execute them.
    """
    commands = reader.commands()
    announced = {
        row[0]
        for row in database.rows(
            "SELECT json_extract(data, '$.id') FROM events WHERE kind IN ('command', 'note')"
        )
    }
    ids = {command.id for command in commands}
    lost = sorted(str(i) for i in announced - ids if i)
    if lost:
        yield problem(
            "commands", f"commands were acknowledged and are lost: {listed(lost)}", RESTORE
        )
    silent = [c.id for c in commands if c.id not in announced and not c.id.startswith(OF_START)]
    if silent:
        yield problem("commands", f"commands have no event: {listed(silent)}", RESTORE)
    numbered = database.version >= schema.COMMANDS_ARE_NUMBERED
    without = [
        c.id
        for c in commands
        if c.status == "applied" and (_has_no_effect(c) or (numbered and c.applied_step is None))
    ]
    if without:
        yield problem("commands", f"applied commands have no effect: {listed(without)}", RESTORE)
    unexplained = [c.id for c in commands if c.status == "rejected" and not c.reason]
    if unexplained:
        text = f"rejected commands have no reason: {listed(unexplained)}"
        yield problem("commands", text, RESTORE)
    waiting = [c.id for c in commands if c.status in UNFINISHED]
    if waiting and state == "crashed":
        text = f"commands were not carried out before the engine died: {listed(waiting)}"
        yield note("commands", text, f"{resume} rejects them; then send them again")
    elif waiting and state in ENDED_STATES:
        text = (
            f"the run has ended, and commands were neither applied nor rejected: {listed(waiting)}"
        )
        yield problem("commands", text, f"{resume} rejects them")


def _has_no_effect(command: CommandRow) -> bool:
    """Whether an applied command lacks what its kind leaves in the journal."""
    kind = COMMANDS.get(command.command, Command)  # one of a later version leaves what it may
    if issubclass(kind, SettingCommand | Undo):
        return not command.changes
    if kind is Probe:
        return not command.result
    return kind is Note and not command.args.get("text")
