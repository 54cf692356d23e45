"""Names of checkpoints, the marker of complete ones, and the settings saved in them.

The rest of their contents is read by the ranks.
"""

import re
from pathlib import Path
from typing import Any

import msgspec

COMPLETE = "COMPLETE"
"""The file that is created last, once the journal holds everything up to the checkpoint's step."""
_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint, in a session's folder of checkpoints."""
    return checkpoints / f"step-{step:06d}"


def complete_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """All complete checkpoints by step, in ascending order."""
    found = {}
    for marker in checkpoints.glob(f"step-*/{COMPLETE}"):
        if match := _NAME.fullmatch(marker.parent.name):
            found[int(match[1])] = marker.parent
    return dict(sorted(found.items()))


class _SavedState(msgspec.Struct, frozen=True):
    settings: dict[str, Any] = {}


class _StateFile(msgspec.Struct, frozen=True):
    """The part of a checkpoint's state.json that has the settings."""

    state: _SavedState = _SavedState()


def saved_settings(folder: Path) -> dict[str, Any]:
    """The live settings that a checkpoint restores: those of the step after it.

    Returns:
        Setting → value. A mapping, because versions have different settings; empty if state.json
        is missing or damaged, which the rank that loads it reports.
    """
    try:
        text = (folder / "state.json").read_bytes()
        return msgspec.json.decode(text, type=_StateFile).state.settings
    except (OSError, msgspec.DecodeError):
        return {}
