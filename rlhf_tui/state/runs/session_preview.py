"""The preview of the highlighted session on the sessions screen: curves, responses, settings."""

from typing import Any

import msgspec
from msgspec import Struct

from engine.config.schema import RunConfig
from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.metrics import KL, SCORE, with_drawn
from engine.session.folder import SessionFolder
from rlhf_tui.state.feeds.first_read import read_summary
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.runs.differences import configuration_of, differing

METRICS = (SCORE, KL)
SPANS = 200
"""Spans of a downsampled curve: about the dot columns of a preview's chart."""
RESPONSES = 16
REQUIRED = ("model", "data", "reward")
"""Sections without a default; the configuration of defaults takes them from the session."""


class Difference(Struct, frozen=True):
    """A configuration key whose value differs."""

    key: str
    value: Any
    other: Any
    """The value of the other session, or the default."""


class SessionPreview(Struct, frozen=True):
    """The preview of a session."""

    folder: str
    update: SessionUpdate = msgspec.field(default_factory=SessionUpdate)
    """Its summary, the last alert, the newest responses, and the downsampled curves of
    :data:`METRICS` and of the metrics drawn with them."""
    against: str = ""
    """The name of the session that it is compared with; empty: the defaults."""
    differences: tuple[Difference, ...] = ()
    problem: str = ""
    """Why the session cannot be read; with an update, why no settings are compared."""


def read_preview(session: SessionFolder, other: SessionFolder | None) -> SessionPreview:
    """Reads the preview of a session. Call it in a thread: it takes some tens of milliseconds.

    Args:
        session: the highlighted one.
        other: the session to compare its settings with; None for the defaults.
    """
    against = other.name if other is not None else ""
    try:
        with JournalReader(session) as reader:
            alert = reader.last_alert()
            update = SessionUpdate(
                head=read_summary(session, reader),
                downsampled=reader.metrics.downsampled(with_drawn(METRICS), SPANS),
                names=reader.metrics.names(),
                events=[alert] if alert is not None else [],
                samples=reader.samples.newest(RESPONSES),
            )
    except (RlhfError, OSError) as error:
        return SessionPreview(str(session.folder), problem=str(error))
    try:
        differences = _differences(session, other)
    except (RlhfError, OSError) as error:  # a configuration, such as one of another version
        return SessionPreview(str(session.folder), update, problem=str(error))
    return SessionPreview(str(session.folder), update, against, differences)


def _differences(session: SessionFolder, other: SessionFolder | None) -> tuple[Difference, ...]:
    """The keys with other values, those that may change during a run first."""
    values = configuration_of(session)
    others = _defaults(session) if other is None else configuration_of(other)
    keys = differing([values, others])
    return tuple(Difference(key, values.get(key), others.get(key)) for key in keys)


def _defaults(session: SessionFolder) -> dict[str, Any]:
    from engine.config import file as config_file  # noqa: PLC0415 - YAML is slow to import

    config = session.config()
    own = {section: getattr(config, section) for section in REQUIRED}
    # Without the rules: a required section may need other sections, as reward.environment does.
    return config_file.to_flat(config_file.complete(RunConfig(**own)))
