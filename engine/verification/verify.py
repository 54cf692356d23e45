"""All checks of one session, for `rlhf-tui verify`."""

from collections.abc import Iterator
from contextlib import closing

from msgspec import Struct

from engine.errors import ConfigError, JournalError
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.journal.judgements.labels import LabelReader
from engine.journal.reader import JournalReader
from engine.session.checkpoints import complete_checkpoints
from engine.session.folder import SessionFolder
from engine.session.states import ENDED_STATES
from engine.verification.checkpoints import check_checkpoints
from engine.verification.databases import RESTORE, check_databases
from engine.verification.finding import Finding, listed, problem
from engine.verification.history import check_commands, check_steps
from engine.verification.leftovers import check_access, check_leftovers
from engine.verification.responses import check_labels, check_samples
from engine.verification.settings import check_settings


class Contents(Struct, frozen=True, kw_only=True):
    """The contents of the session; 0 for those that cannot be read."""

    state: str = "unreadable"
    checkpoints: int = 0
    steps: int = 0
    commands: int = 0
    samples: int = 0
    labels: int = 0


class Verified(Struct, frozen=True):
    """The checked contents and the findings."""

    contents: Contents
    findings: list[Finding]

    @property
    def problems(self) -> int:
        """The number of findings that are not notes."""
        return sum(finding.level == "problem" for finding in self.findings)


def verify(session: SessionFolder) -> Verified:
    """Checks a session without changing it. One that is live may be checked as well.

    Reads every file of every checkpoint, which takes about a second for each gigabyte.
    """
    live = session.is_live()
    findings = [*check_access(session), *check_leftovers(session, live=live)]
    findings += _check_config(session)
    findings += check_databases(session, live=live)
    try:
        if not session.journal_file.is_file():
            findings += _check_without_journal(session)
        for finding in _check_contents(session):
            findings.append(finding)
        contents = _contents(session)
    except (JournalError, ConfigError) as error:
        contents = Contents(
            checkpoints=len(complete_checkpoints(session.checkpoints, lenient=True))
        )
        if not any(str(error) in f.text for f in findings):  # reported by the checks of the files
            findings.append(problem("files", str(error), RESTORE))
    return Verified(contents, findings)


def _check_contents(session: SessionFolder) -> Iterator[Finding]:
    journal = ReadOnlyDatabase(session.journal_file, schema.JOURNAL)
    samples = ReadOnlyDatabase(session.samples_file, schema.SAMPLES)
    with closing(samples), JournalReader(session, journal) as reader:
        yield from check_checkpoints(session, reader)
        if journal.connection is None:
            return
        # A live engine writes meanwhile. The state comes first: later, it may have ended. The
        # samples come before the journal, which gets the rows of a step after them.
        state = None if session.is_live() else reader.state()
        with samples.snapshot(), journal.snapshot():
            yield from check_steps(journal, reader.attempts())
            yield from check_commands(journal, reader, session.command("resume"), state)
            yield from check_settings(session, journal, reader)
            yield from check_samples(journal, samples, ended=state in ENDED_STATES)
        yield from check_labels(session, samples)


def _check_config(session: SessionFolder) -> Iterator[Finding]:
    try:
        session.config()
    except ConfigError as error:
        yield problem("files", f"config.yaml: {error}", "restore or repair the file")


def _check_without_journal(session: SessionFolder) -> Iterator[Finding]:
    steps = list(complete_checkpoints(session.checkpoints, lenient=True))
    if steps:
        yield problem(
            "files",
            f"journal.db is missing; there are checkpoints of steps {listed(steps)}",
            f"restore it, or: {session.command('resume', '--from', str(steps[-1]))}",
        )
        return
    if responses := _response_count(session):
        yield problem(
            "files",
            f"journal.db is missing; samples.db has {responses} responses of its steps",
            "restore it: without it and without a checkpoint the session cannot be continued",
        )


def _response_count(session: SessionFolder) -> int:
    samples = ReadOnlyDatabase(session.samples_file, schema.SAMPLES)
    with closing(samples):
        counted = samples.rows("SELECT count(*) FROM samples")
    return int(counted[0][0]) if counted else 0


def _contents(session: SessionFolder) -> Contents:
    with JournalReader(session) as reader, LabelReader(session) as labels:
        return Contents(
            state=reader.state(),
            checkpoints=len(complete_checkpoints(session.checkpoints, lenient=True)),
            steps=reader.last_step(),
            commands=len(reader.commands()),
            samples=_response_count(session),
            labels=len(labels.judgements()) + len(labels.preferences()),
        )
