"""Checks that samples belong to existing steps, and arrays and labels to existing samples."""

from collections.abc import Iterator

from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.journal.judgements.labels import LabelReader, Response
from engine.session.folder import SessionFolder
from engine.verification.databases import RESTORE
from engine.verification.finding import Finding, listed, note, problem


def check_samples(
    journal: ReadOnlyDatabase, samples: ReadOnlyDatabase, *, ended: bool
) -> Iterator[Finding]:
    """Checks the recorded responses against the steps.

    Args:
        journal: the session's journal.
        samples: the session's samples.
        ended: whether the run has ended. A crashed or live one may have samples of the step after
            the last, because they are written before the step.
    """
    steps = {step for (step,) in journal.rows("SELECT step FROM steps")}
    allowed = steps if ended else steps | {max(steps, default=0) + 1}
    if samples.connection is None:
        if steps:
            text = "samples.db is missing or empty: the responses are lost, nothing else"
            yield problem("samples", text, "restore it; a resume begins a new one")
        return
    tables = [("samples", allowed)]
    if samples.version >= schema.EVALUATED_ARE_KEPT:
        tables.append(("evaluated", allowed | {0}))
    for table, known in tables:
        query = f"SELECT DISTINCT step FROM {table} ORDER BY step"  # noqa: S608 - constants
        loose = [step for (step,) in samples.rows(query) if step not in known]
        if not loose:
            continue
        text = f"there are responses ({table}) of steps without a row: {listed(loose)}"
        if not ended and loose[0] > max(steps, default=0):
            text += ": the engine was killed when it abandoned them"
            yield note("samples", text, "the next attempt moves them to their branch")
        else:
            yield problem("samples", text, RESTORE)
    loose = samples.rows(
        "SELECT DISTINCT step FROM arrays WHERE NOT EXISTS (SELECT 1 FROM samples "
        "WHERE samples.step = arrays.step AND samples.idx = arrays.idx)"
    )
    if loose:
        text = (
            f"there are per-token values without a sample, of steps {listed(s for (s,) in loose)}"
        )
        yield problem("samples", text, RESTORE)


def check_labels(session: SessionFolder, samples: ReadOnlyDatabase) -> Iterator[Finding]:
    """Checks that the samples that labels and preferences refer to exist."""
    with LabelReader(session) as labels:
        judged = [j.response for j in labels.judgements().values()]
        preferred = [r for p in labels.preferences() for r in (p.chosen, p.rejected)]
    lost = [_name(r) for r in (*judged, *preferred) if not _exists(samples, r)]
    if lost:
        text = f"labels are of samples that are not there: {listed(lost)}"
        advice = "restore samples.db; the labels hold prompt and response, an export has them"
        yield problem("labels", text, advice)
    if session.labels_file.with_name(f"{session.labels_file.name}-journal").exists():
        text = "labels.db-journal is left: a client died while it wrote a label"
        yield note("labels", text, "the next program that reads the labels rolls it back")


def _exists(samples: ReadOnlyDatabase, response: Response) -> bool:
    """Whether a response is recorded; those of the reference have no step and are not."""
    if response.step is None or samples.connection is None:
        return response.step is None
    values = (response.attempt, response.step, response.index, response.response)
    match = "attempt = ? AND step = ? AND idx = ? AND response = ?"
    return any(
        samples.rows(f"SELECT 1 FROM {table} WHERE {match} LIMIT 1", values)  # noqa: S608 - constants
        for table in ("samples", "samples_past")
    )


def _name(response: Response) -> str:
    return f"step {response.step} index {response.index} (attempt {response.attempt})"
