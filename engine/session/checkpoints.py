"""Names of checkpoints and the marker of complete ones; their contents are read by the ranks."""

import re
from pathlib import Path

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
