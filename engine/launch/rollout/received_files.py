"""The files that a generating machine receives from the run's first machine."""

import re
import shutil
from pathlib import Path
from typing import BinaryIO

from engine.errors import LinkError
from engine.launch.rollout.engine import shared_folder
from engine.protocol.rollout.join_messages import WEIGHTS, FilePart
from engine.session.temporary_folders import TemporaryFolder

CONFIGURATION = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.json")
"""Allowed names of files in the model folder."""


class ReceivedFiles:
    """Stores what the first machine sends: the model's configuration, and weights."""

    def __init__(self) -> None:
        """Makes the folders, in shared memory and on a disk."""
        self._shared, self._disk = TemporaryFolder(shared_folder()), TemporaryFolder()
        self.model = self._disk.path / "model"
        """The folder of the configuration."""
        self.model.mkdir()
        self.weights: Path | None = None
        """The file of the last weights."""
        self._open: BinaryIO | None = None

    def write(self, part: FilePart) -> None:
        """Writes the next bytes of a file.

        Raises:
            LinkError: a file of this name is not allowed.
            OSError: there is no room for it.
        """
        if part.offset == 0:
            self._begin(part)
        if self._open is None or self._open.tell() != part.offset:
            raise LinkError(f"the parts of {part.name!r} are not in order")
        self._open.write(part.data)
        if self._open.tell() >= part.size:
            self._open.close()
            self._open = None

    def _begin(self, part: FilePart) -> None:
        if self._open is not None:
            raise LinkError(f"{part.name!r} begins before another file has ended")
        if part.name == WEIGHTS:
            if self.weights is not None:
                self.weights.unlink()
            free = shutil.disk_usage(self._shared.path).free
            folder = self._shared if part.size <= free else self._disk
            path = self.weights = folder.path / WEIGHTS
        elif CONFIGURATION.fullmatch(part.name):
            path = self.model / part.name
        else:
            raise LinkError(f"{part.name!r} is not a file of a model")
        self._open = path.open("wb")

    def close(self) -> None:
        """Removes all files."""
        if self._open is not None:
            self._open.close()
        self._shared.close()
        self._disk.close()
