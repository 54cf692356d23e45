"""A session as `ls` and `status` print it and the sessions screen shows it."""

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from engine.errors import ConfigError, LinkError, RlhfError, SessionError
from engine.journal.json_values import Json
from engine.journal.reader import JournalReader
from engine.metrics import EVAL_SCORE, EVAL_SCORE_CI, KL, SCORE
from engine.protocol.client import Client
from engine.session.checkpoints import aside_checkpoints, complete_checkpoints
from engine.session.folder import SessionFolder
from engine.session.states import LIVE_STATES
from rlhf_tui.identity import who

REPLY_TIMEOUT = 2.0
"""Seconds to wait for an engine that is asked what it waits for."""
READERS = 8
"""Threads that read the rows of several sessions."""


class HeldOutScore(msgspec.Struct, frozen=True):
    """The result of an evaluation on held-out prompts."""

    step: int
    score: float
    interval: float | None
    """Half the width of the 95 % confidence interval; None for a single prompt."""


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """A session. The fields are the keys that `status --json` prints, in their order."""

    name: str
    state: str
    step: int = 0
    total_steps: int | None = None
    attempt: int = 0
    beta: float | None = None
    """In force; None while a fork loads its checkpoint."""
    pid: int | None = None
    """Process id of its engine; None without an engine."""
    host: str | None = None
    score: float | None = None
    kl: float | None = None
    held_out: HeldOutScore | None = None
    """The last evaluation; None without one."""
    settings: dict[str, Any] = {}
    """In force. A mapping: a session of another version has other settings."""
    checkpoints: list[int] = []
    """Steps that can be resumed from."""
    best_checkpoint: int | None = None
    """The best of them by `train.best_metric`; None without one, or if it was not requested."""
    moved_aside: list[str] = []
    """Checkpoints of abandoned branches that were moved aside, such as `120-attempt-2`; empty if
    not requested."""
    message: str = ""
    pause_reason: str | None = None
    """What paused it: `kl_high at step 4: KL 7.26 > 6`. None if a person did, or if it is not
    paused."""
    waits_for: str | None = None
    """What its engine waits for: `room on the disk`. None without an engine, if it does not reply,
    or if it was not asked."""
    deadline: float | None = None
    """Unix time before which its engine saves and ends; None without one."""
    updated: float | None = None
    """Time of its last step or of the start of its last engine, whichever is later."""
    size: int | None = None
    """Bytes of its files; None if not requested. Files that a fork shares with its parent by hard
    links count for both."""
    folder: str

    def as_json(self) -> Json:
        """As `status --json` prints it."""
        held_out = msgspec.structs.asdict(self.held_out) if self.held_out is not None else None
        return msgspec.structs.asdict(self) | {"held_out": held_out}


class ListedSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session as the browser lists it."""

    row: SessionRow
    started: float = 0.0
    """Unix time of the start of its last engine; 0 if none has begun."""
    spark: str = ""
    """The newest values of the chosen metric as a line of blocks."""
    value: float | None = None
    """The last value of the chosen metric."""
    metrics: tuple[str, ...] = ()
    """The names of all of its metrics."""
    settings: dict[str, Any] = {}
    """Its configuration, flat, if requested; live settings have the values in force."""


def read_session_row(
    session: SessionFolder, *, ask: bool = False, best: bool = False
) -> SessionRow:
    """Reads the row of a session.

    Args:
        session: the session to read.
        ask: also ask its engine what it waits for; one that hangs takes :data:`REPLY_TIMEOUT`.
            Also read its size, which looks at each of its files, and what was moved aside.
        best: also read its best checkpoint. If an earlier version has run the session, this opens
            the configuration, which takes some ten milliseconds.

    Raises:
        RlhfError: its journal or its configuration cannot be read.
        OSError: its folder cannot be read.
    """
    with JournalReader(session) as reader:
        row = session_row(session, reader)
        if ask:
            row = msgspec.structs.replace(
                row,
                size=session.disk_usage().size,
                moved_aside=list(aside_checkpoints(session.checkpoints)),
            )
        if best and row.checkpoints:
            found = _best_checkpoint(session, reader)
            row = msgspec.structs.replace(row, best_checkpoint=found)
    if not ask or row.pid is None:
        return row
    return msgspec.structs.replace(row, waits_for=awaited(session))


def read_session_rows(sessions: Iterable[SessionFolder], *, best: bool) -> list[SessionRow]:
    """The rows of several sessions in their order, see :func:`read_session_row` with `ask`.

    The row of one that cannot be read has the reason. They are read in threads, because most of the
    time is spent waiting for a network file system, or for an engine that hangs.
    """

    def read(session: SessionFolder) -> SessionRow:
        try:
            return read_session_row(session, ask=True, best=best)
        except (RlhfError, OSError) as error:
            return unreadable_row(session, error)

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(read, sessions))


def _best_checkpoint(session: SessionFolder, reader: JournalReader) -> int | None:
    # All else of a session can be read with a configuration of another version.
    with contextlib.suppress(ConfigError):
        metric = reader.meta().best_metric or session.config().train.best_metric
        return reader.best_checkpoint(metric)
    return None


def awaited(session: SessionFolder) -> str | None:
    """What an engine waits for; None if nothing, or if it does not reply.

    The journal cannot tell, because the full disk is its own. An engine that hangs takes
    :data:`REPLY_TIMEOUT`.
    """
    # Without a reply the row is still right; a command is what tells that an engine hangs.
    with contextlib.suppress(LinkError, SessionError, OSError):
        with Client(session, who(), REPLY_TIMEOUT) as client:
            phases = client.status().phases
        return next((phase.waits_for for phase in phases if phase.waits_for), None)
    return None


def session_row(session: SessionFolder, reader: JournalReader) -> SessionRow:
    """Reads the row of a session with an open reader; raises like :func:`read_session_row`."""
    session.check_config_file()  # without it the session cannot be resumed
    meta, attempts = reader.meta(), reader.attempts()
    state = reader.state() if meta.state in LIVE_STATES else meta.state
    last = reader.metrics.last_row((SCORE, KL))
    checkpoints = [c.step for c in reader.checkpoints(("complete",))]
    held_out = read_held_out(reader)
    engine = session.engine() if session.is_live() else None
    metrics = last.values if last is not None else {}
    active = [attempts[-1].started] if attempts else []
    if last is not None and last.time is not None:
        active.append(last.time)
    settings = meta.settings or {}
    beta = settings.get("beta")
    # What a fork takes from its checkpoint is known once that is loaded.
    from_checkpoint = bool(attempts) and attempts[-1].from_step > 0
    if beta is None and not from_checkpoint:
        beta = session.config().kl.beta  # YAML is slow
    return SessionRow(
        name=session.name,
        state=state,
        step=last.step if last is not None else 0,
        total_steps=meta.total_steps or session.config().train.steps,
        attempt=len(attempts),
        beta=beta,
        pid=engine.pid if engine else None,
        host=engine.host if engine else None,
        score=metrics.get(SCORE),
        kl=metrics.get(KL),
        held_out=held_out,
        settings=settings,
        checkpoints=checkpoints,
        message=meta.message if attempts else _lost_history(session),
        pause_reason=meta.pause_reason if state == "paused" else None,
        deadline=meta.deadline if engine else None,
        updated=max(active, default=None),
        folder=str(session.folder),
    )


def _lost_history(session: SessionFolder) -> str:
    """Tells that a session without recorded attempts has checkpoints; empty if it has none."""
    if not complete_checkpoints(session.checkpoints):
        return ""
    return f"the journal of its checkpoints is missing; see {session.command('verify')}"


def read_held_out(reader: JournalReader) -> HeldOutScore | None:
    """Reads the result of the last evaluation; None without one. Raises JournalError."""
    newest = reader.metrics.newest_value(EVAL_SCORE)
    if newest is None:
        return None
    step, score = newest
    interval = reader.metrics.value_at(EVAL_SCORE_CI, step)
    return HeldOutScore(step, score, interval)


def unreadable_row(session: SessionFolder, error: RlhfError | OSError) -> SessionRow:
    """Returns the row of a session that cannot be read, so that the others can still be listed."""
    return SessionRow(
        name=session.name, state="unreadable", message=str(error), folder=str(session.folder)
    )
