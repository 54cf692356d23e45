"""Checks checkpoints: the sums of their files, and that journal and disk have the same ones."""

from collections.abc import Iterator
from pathlib import Path

from engine.journal.reader import JournalReader
from engine.journal.rows import CheckpointRow
from engine.session.checkpoints import (
    aside_checkpoints,
    complete_checkpoints,
    find_damage,
    unreadable_checkpoints,
)
from engine.session.folder import SessionFolder
from engine.verification.finding import Finding, listed, note, problem


def check_checkpoints(session: SessionFolder, reader: JournalReader) -> Iterator[Finding]:
    """Reads every file of every complete checkpoint, and compares with the journal."""
    rows = _all(reader)
    on_disk = complete_checkpoints(session.checkpoints, lenient=True)
    for step, error in unreadable_checkpoints(session.checkpoints).items():
        yield _unreadable(f"the checkpoint of step {step}", error)
    yield from _damaged(on_disk)
    yield from _damaged_aside(session)
    yield from _lost(session, reader, rows)
    yield from _unknown(session, reader, rows, on_disk)


def _unreadable(what: str, error: OSError) -> Finding:
    text = f"{what} cannot be read: {error}"
    return problem("checkpoints", text, "solve this, and do not remove it")


def _damaged(on_disk: dict[int, Path]) -> Iterator[Finding]:
    for step, folder in on_disk.items():
        try:
            damage = find_damage(folder)
        except OSError as error:
            yield _unreadable(f"the checkpoint of step {step}", error)
            continue
        if damage and folder.is_dir():  # an engine may have removed it in the meantime
            others = [s for s in on_disk if s != step]
            yield problem(
                "checkpoints",
                f"the checkpoint of step {step} is damaged: {damage}",
                f"remove {folder}"
                + (f", and resume from another one (of steps {listed(others)})" if others else ""),
            )


def _damaged_aside(session: SessionFolder) -> Iterator[Finding]:
    """Those that were moved aside: no run continues from one, but its policy can be copied."""
    for name, folder in aside_checkpoints(session.checkpoints).items():
        try:
            damage = find_damage(folder)
        except OSError as error:
            yield _unreadable(f"the checkpoint {name}, of an abandoned branch,", error)
            continue
        if damage and folder.is_dir():
            text = f"the checkpoint {name}, of an abandoned branch, is damaged: {damage}"
            advice = session.command("rm", "--checkpoint", name)
            yield problem("checkpoints", text, f"no run needs it; delete it with {advice}")


def _lost(
    session: SessionFolder, reader: JournalReader, rows: list[CheckpointRow]
) -> Iterator[Finding]:
    """Checkpoints that only the journal has."""
    on_disk = {
        *complete_checkpoints(session.checkpoints, lenient=True),
        *unreadable_checkpoints(session.checkpoints),
    }
    lost = [row.step for row in rows if row.status == "complete" and row.step not in on_disk]
    if lost and session.is_live():  # they may have been removed since the journal was read
        kept = {row.step for row in _all(reader) if row.status == "complete"}
        lost = [step for step in lost if step in kept]
    if lost:
        yield problem(
            "checkpoints",
            f"the disk lacks complete checkpoints of the journal, of steps {listed(lost)}",
            f"restore them in {session.checkpoints}, or resume from another one with --from",
        )


def _unknown(
    session: SessionFolder,
    reader: JournalReader,
    rows: list[CheckpointRow],
    on_disk: dict[int, Path],
) -> Iterator[Finding]:
    """Checkpoints that only the disk has."""
    known = {row.step for row in rows}
    unknown = [step for step in on_disk if step not in known]
    if unknown and session.is_live():  # it may have been written after the journal was read
        known = {row.step for row in _all(reader)}
        unknown = [step for step in unknown if step not in known]
    removed = {row.step for row in reader.checkpoints(("removed",))}
    if left := [step for step in unknown if step in removed]:
        text = f"checkpoints were to be removed and are still there, of steps {listed(left)}"
        advice = f"the next engine removes them; remove copies yourself, in {session.checkpoints}"
        yield note("checkpoints", text, advice)
    if unknown := [step for step in unknown if step not in removed]:
        yield problem(
            "checkpoints",
            f"the journal lacks the checkpoints of steps {listed(unknown)}: its newest rows are "
            "lost, or the folders were copied here",
            "restore journal.db, or continue from one with "
            + session.command("resume", "--from", "STEP"),
        )


def _all(reader: JournalReader) -> list[CheckpointRow]:
    return reader.checkpoints(("complete", "written", "superseded", "abandoned", "replaced"))
