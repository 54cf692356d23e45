"""What a checkpoint's folder and its step have that the list of checkpoints has not."""

import os
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from engine.config.settings import LIVE_SETTINGS
from engine.journal.rows import CheckpointRow, SampleRow
from engine.journal.samples import SampleReader
from engine.session.checkpoints import checkpoint_path, saved_settings
from engine.session.folder import SessionFolder
from rlhf_tui.format import value_text


class CheckpointDetails(Struct, frozen=True):
    """The details of a checkpoint."""

    checkpoint: CheckpointRow
    folder: str = ""
    """Where it is; empty if there is no such folder here, as with a copy of a session, or if this
    user may not see it."""
    settings: dict[str, Any] = {}
    """The settings in force after its step; empty if they cannot be read."""
    samples: list[SampleRow] = []
    """The responses of its step; empty for a checkpoint of an abandoned branch."""


def read_details(session: SessionFolder, checkpoint: CheckpointRow) -> CheckpointDetails:
    """Reads the details of a checkpoint. Call it in a thread.

    Raises:
        JournalError: the samples cannot be read.
    """
    if checkpoint.status != "complete":
        return CheckpointDetails(checkpoint)
    folder = checkpoint_path(session.checkpoints, checkpoint.step)
    with SampleReader(session) as samples:
        return CheckpointDetails(
            checkpoint,
            str(folder) if os.path.isdir(folder) else "",  # noqa: PTH112 - Path.is_dir may raise
            saved_settings(folder),
            samples.of_step(checkpoint.step),
        )


def changed_settings(
    now: Mapping[str, Any], saved: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """The settings that differ from saved ones: each with its value now, and the saved one."""
    return [
        (key, old, new)
        for key in LIVE_SETTINGS
        if key in saved and (old := value_text(now.get(key))) != (new := value_text(saved[key]))
    ]
