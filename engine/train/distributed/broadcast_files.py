"""What rank 0 reads, on every rank: configurations and tokenizers (weights go by `sharding`)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch

from engine.train.distributed.ranks import RankGroup


@contextmanager
def broadcast_files(ranks: RankGroup, *things: Any) -> Iterator[Path]:
    """A folder with what rank 0's things wrote by their `save_pretrained`, on every rank.

    Other machines need no copy of a model's folder, and no way to the hub.
    """
    with TemporaryDirectory(prefix="rlhf-tui-") as name:
        folder = Path(name)
        files: dict[str, bytes] = {}
        if ranks.is_lead and ranks.size > 1:
            for thing in things:
                thing.save_pretrained(folder)
            files = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
        told = ranks.broadcast_bytes(msgspec.msgpack.encode(files))
        if not ranks.is_lead:
            for file, content in msgspec.msgpack.decode(told, type=dict[str, bytes]).items():
                (folder / Path(file).name).write_bytes(content)
        yield folder


def without_weights(ranks: RankGroup) -> AbstractContextManager[Any]:
    """Modules made in here have shapes and no memory, on all ranks but the first."""
    return nullcontext() if ranks.is_lead else torch.device("meta")
