"""Broadcasts configurations and tokenizers that only rank 0 reads.

Weights are broadcast by :mod:`engine.train.distributed.sharding`.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch

from engine.examined import examined
from engine.launch.environment import STORE_VARIABLE
from engine.train.distributed.ranks import RankGroup


@contextmanager
def broadcast_files(ranks: RankGroup, *sources: Any) -> Iterator[Path]:
    """Gives every rank a temporary folder with the files of rank 0's objects.

    Only rank 0 needs the model's folder or access to the hub. All ranks must call it. For a single
    rank the folder is empty.

    Args:
        ranks: all ranks.
        sources: objects with a `save_pretrained` method; ignored on the other ranks.
    """
    with TemporaryDirectory(prefix="rlhf-tui-", dir=_attempt_folder()) as name:
        folder = Path(name)
        files: dict[str, bytes] = {}
        if ranks.is_lead and ranks.size > 1:
            for source in sources:
                source.save_pretrained(folder)
            files = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
        received = ranks.broadcast_bytes(msgspec.msgpack.encode(files))
        if not ranks.is_lead:
            for file, content in msgspec.msgpack.decode(
                received, type=examined(dict[str, bytes])
            ).items():
                (folder / Path(file).name).write_bytes(content)
        yield folder


def _attempt_folder() -> str | None:
    """The supervisor's temporary folder, which is removed even if this rank is killed.

    None if there is none: on several machines, or without a supervisor.
    """
    kind, _, path = os.environ.get(STORE_VARIABLE, "").partition(":")
    return str(Path(path).parent) if kind == "file" else None


def without_weights(ranks: RankGroup) -> AbstractContextManager[Any]:
    """Modules constructed in this context are on the meta device, except on rank 0."""
    return nullcontext() if ranks.is_lead else torch.device("meta")
