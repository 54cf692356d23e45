"""The run that a steering key acts on."""

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from engine.config.settings import Settings
from engine.examined import examined
from engine.session.folder import SessionFolder
from rlhf_tui.state.runs.session_row import SessionRow
from rlhf_tui.state.session_state import SessionState

NO_SESSION = "no session selected; n starts a demo"
"""Said by a key that needs a session, if the list is empty."""


class SteeringTarget(Struct, frozen=True):
    """A run as it was last read: the open session, or a row of the sessions screen."""

    session: SessionFolder
    state: str
    step: int
    live: bool
    """Whether an engine runs it."""
    settings: dict[str, Any]
    """In force. A mapping: a session of another version has other settings."""
    checkpoints: list[int]
    """Steps that can be resumed from."""
    boundary_in: float | None = None
    """Estimated seconds until the current step ends; None if unknown."""

    @classmethod
    def of_state(cls, session: SessionFolder, state: SessionState) -> "SteeringTarget":
        """The open session."""
        return cls(
            session=session,
            state=state.head.state,
            step=state.head.step,
            live=state.live,
            settings=state.head.settings,
            checkpoints=[c.step for c in state.checkpoints if c.status == "complete"],
            boundary_in=state.boundary_in(),
        )

    @classmethod
    def of_row(cls, row: SessionRow) -> "SteeringTarget":
        """A listed session. Its current phase is not read, so `boundary_in` is unknown."""
        return cls(
            session=SessionFolder(Path(row.folder)),
            state=row.state,
            step=row.step,
            live=row.pid is not None,
            settings=row.settings,
            checkpoints=row.checkpoints,
        )

    @property
    def name(self) -> str:
        """The session's name."""
        return self.session.name

    @property
    def beta(self) -> float | None:
        """The KL coefficient in force."""
        return self.settings.get("beta")


def settings_in_force(settings: dict[str, Any]) -> Settings | None:
    """A run's settings as a struct; None if another version wrote them."""
    try:
        return msgspec.convert(settings, examined(Settings), strict=False)
    except msgspec.ValidationError:
        return None
