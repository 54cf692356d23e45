"""Gives every rank the prompts that rank 0 has loaded.

Small data sets are sent. Those in the cache are memory-mapped by every rank that sees rank 0's
file; to machines that do not, the file is sent once.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import msgspec
from transformers import PreTrainedTokenizerBase

from engine.config.sections.model import DataConfig, PromptSource
from engine.progress import BeginPart, no_progress
from engine.train.data.load_prompts import (
    LoadedSet,
    load_sets,
    ordered,
    within_limits,
)
from engine.train.data.prompt_cache import (
    PROMPTS,
    WRITE_ERRORS,
    PromptCache,
    PromptCaches,
    open_entry,
)
from engine.train.data.prompt_order import Prompts
from engine.train.data.prompt_table import PromptTable
from engine.train.distributed.ranks import RankGroup

log = logging.getLogger("engine")

PART_BYTES = 64 << 20
"""Bytes of a file that are sent at once."""
WITHOUT_ROWS = "-prompts"
"""Ends the name of an entry that was sent: it has no rows, which only rank 0 needs."""


class _SharedSet(msgspec.Struct):
    """What rank 0 sends the other ranks about a data set."""

    source: PromptSource
    left_out: dict[str, int]
    packed: bytes = b""
    """Its usable prompts, if they are not in the cache."""
    entry: str = ""
    """The folder of all its prompts in rank 0's cache."""


def load_on_all_ranks(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    ranks: RankGroup,
    *,
    per_step: int,
    seed: int,
    key: str = "data",
    begin: BeginPart = no_progress,
) -> Prompts:
    """Loads the prompts on rank 0; returns them on every rank. A collective.

    See :func:`engine.train.data.load_prompts.load_prompts`.
    """
    if ranks.size == 1:
        sets = load_sets(config, tokenizer, key, begin)
        return ordered(sets, config, per_step=per_step, seed=seed)
    sets = load_sets(config, tokenizer, key, begin) if ranks.is_lead else []
    shared = ranks.broadcast(lambda: [_shared(one) for one in sets], list[_SharedSet])
    caches = PromptCaches(config.cache)
    for one in shared:
        folder = _folder_of(one, caches)
        missing = bool(one.entry) and folder is None
        if b"1" in ranks.all_gather_bytes(b"1" if missing else b"0"):
            _send(Path(one.entry), caches, ranks, missing=missing)
            folder = _folder_of(one, caches)
        if not ranks.is_lead:
            sets.append(_received(one, folder, config))
    return ordered(sets, config, per_step=per_step, seed=seed)


def _shared(one: LoadedSet) -> _SharedSet:
    if one.entry is None:
        return _SharedSet(one.source, one.left_out, packed=one.table.pack())
    return _SharedSet(one.source, one.left_out, entry=str(one.entry))


def _folder_of(one: _SharedSet, caches: PromptCaches) -> Path | None:
    """Where this rank sees an entry of the cache; None if it does not, or there is none."""
    if not one.entry:
        return None
    entry = Path(one.entry)
    return (
        PromptCache(entry.parent).find(entry.name)
        or caches.find(entry.name)
        or caches.find(entry.name + WITHOUT_ROWS)
    )


def _received(one: _SharedSet, folder: Path | None, config: DataConfig) -> LoadedSet:
    if folder is None:
        return LoadedSet(one.source, PromptTable.unpack(one.packed), None, one.left_out)
    table, _ = within_limits(open_entry(folder, rows=False), config)
    return LoadedSet(one.source, table, folder, one.left_out)


def _send(entry: Path, caches: PromptCaches, ranks: RankGroup, *, missing: bool) -> None:
    """Sends the tokens of an entry to the machines that lack it; a collective.

    One rank of a machine writes them into its cache.
    """
    writes = missing and os.environ.get("LOCAL_RANK", "0") == "0"
    name = entry.name + WITHOUT_ROWS
    with caches.for_writing.making(name) if writes else nullcontext(Path()) as made:
        parts = _parts(entry / PROMPTS, ranks)
        if writes:
            try:
                with (made / PROMPTS).open("wb") as file:
                    file.writelines(parts)
            except WRITE_ERRORS as error:
                raise caches.for_writing.not_writable(error) from error
        else:
            for _ in parts:
                continue
    ranks.all_gather_bytes(b"")  # no rank looks for the file before it is there


def _parts(source: Path, ranks: RankGroup) -> Iterator[bytes]:
    """The bytes of rank 0's file, on every rank."""
    if not ranks.is_lead:
        while data := ranks.broadcast_bytes():
            yield data
        return
    with source.open("rb") as file:
        while data := ranks.broadcast_bytes(file.read(PART_BYTES)):
            yield data
