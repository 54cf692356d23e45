"""Loads the prompts of a run: reads, tokenises, and filters them by length."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pyarrow as pa
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from engine.config.sections.model import DataConfig, PromptSource
from engine.errors import UserInputError
from engine.progress import BeginPart, no_progress
from engine.session.file_signature import file_signature
from engine.train.data.formats import PromptColumn
from engine.train.data.prompt_cache import (
    PROMPTS,
    ROWS,
    WRITE_ERRORS,
    CacheWriteError,
    PromptCache,
    PromptCaches,
    content_hash,
    open_entry,
)
from engine.train.data.prompt_order import Prompts
from engine.train.data.prompt_table import BATCH_ROWS, SCHEMA, PromptTable, write_batches
from engine.train.data.read_rows import decode_rows, local_file, read_rows
from engine.train.data.tokenise import PromptTokenizer, parallel_tokenizers
from engine.train.data.tokenise_pool import Part, encode_parts, worker_count

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("engine")

CACHED_BYTES = 2_000_000
"""Size of a data set from which on its tokens are cached: some ten thousand prompts, which take a
second to tokenise."""

KEY_OF_A_SET = re.compile(r"^data\.(prompts|column|split)\b")
"""The keys of `data` that `eval` has as well, at the beginning of an error."""


@dataclass(frozen=True)
class LoadedSet:
    """One data set."""

    source: PromptSource
    table: PromptTable
    """Its usable prompts."""
    entry: Path | None
    """The folder in the cache that holds all of its prompts; None if they are in memory."""
    left_out: dict[str, int]
    """Number of unused prompts, by reason."""


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    per_step: int,
    seed: int,
) -> Prompts:
    """Reads and tokenises all prompts. Leaves out those that are too short or too long.

    Args:
        config: the data sets, their columns and the limits of length.
        tokenizer: the policy's.
        per_step: prompts of a step, over all ranks.
        seed: determines the order.

    Raises:
        UserInputError: the data cannot be read, or has no usable prompt. Names the file, the
            column or the row.
    """
    return ordered(load_sets(config, tokenizer), config, per_step=per_step, seed=seed)


def ordered(sets: list[LoadedSet], config: DataConfig, *, per_step: int, seed: int) -> Prompts:
    """Returns the prompts of all data sets in the order of a run."""
    left_out: dict[str, int] = {}
    for one in sets:
        for reason, count in one.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    return Prompts(
        [one.table for one in sets],
        per_step=per_step,
        shuffle=config.shuffle,
        seed=seed,
        weights=[one.source.weight for one in sets],
        left_out=left_out,
    )


def load_sets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    key: str = "data",
    begin: BeginPart = no_progress,
) -> list[LoadedSet]:
    """Loads every data set; see :func:`load_prompts`. Raises UserInputError."""
    try:
        caches = PromptCaches(config.cache)
        return [
            _SetLoader(config, source, tokenizer, caches, begin).load() for source in config.sources
        ]
    except UserInputError as error:
        if key == "data" or isinstance(error, CacheWriteError):
            raise
        raise UserInputError(KEY_OF_A_SET.sub(rf"{key}.\1", str(error))) from error


@dataclass(frozen=True)
class _SetLoader:
    """Loads one data set, by the cache if it is large."""

    config: DataConfig
    source: PromptSource
    tokenizer: PreTrainedTokenizerBase
    caches: PromptCaches
    begin: BeginPart

    def load(self) -> LoadedSet:
        """Loads the set. Raises UserInputError."""
        file = local_file(self.source)
        large = file is not None and file.stat().st_size >= CACHED_BYTES
        rows = None if large else read_rows(self.source)
        files = [file] if file is not None else _files_of(rows)
        if rows is not None and sum(path.stat().st_size for path in files) < CACHED_BYTES:
            return self._usable(self._in_memory(rows), None)
        try:
            entry = self._cached(files, rows)
        except CacheWriteError as error:
            if self.config.cache is not None:
                raise
            log.warning("the prompts are kept in memory: %s", error)
            return self._usable(self._in_memory(rows or read_rows(self.source)), None)
        return self._usable(open_entry(entry, rows=True), entry)

    def _cached(self, files: list[Path], rows: "datasets.Dataset | None") -> Path:
        """Returns the entry of the set in the cache; makes it if there is none."""
        signatures = [file_signature(path) for path in files]
        name = content_hash(files, *self._facts())
        found = self.caches.find(name)
        if found is None:
            cache = self.caches.for_writing
            with cache.making(name) as made:
                if rows is None:
                    self.begin("read")
                    rows = self._read_into(made.parent / "read", cache)
                self._fill(made, rows, cache)
                del rows  # it maps files in the temporary folder
                # The entry's name would not match its contents.
                if [file_signature(path) for path in files] != signatures:
                    raise UserInputError(
                        f"data.prompts: {self.source.path} changed while it was read; start again "
                        "when it is complete"
                    )
            found = cache.find(name)
            if found is None:
                raise cache.not_writable(OSError(0, "files written there belong to another user"))
        return found

    def _read_into(self, folder: Path, cache: PromptCache) -> "datasets.Dataset":
        """Reads a file into Arrow files in a folder of the cache."""
        try:
            return read_rows(self.source, folder)
        except UserInputError as error:
            cause = error.__cause__
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cache.not_writable(cause) from error

    def _column(self, rows: "datasets.Dataset") -> PromptColumn:
        name = self.source.column or self.config.column
        return PromptColumn(name, rows.column_names, self.source.path)

    def _prompt_tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer(self.config, self.tokenizer, self.source.path)

    def _in_memory(self, rows: "datasets.Dataset") -> PromptTable:
        every = decode_rows(rows, self.source)
        column, prompt_tokenizer = self._column(rows), self._prompt_tokenizer()
        batches = [
            prompt_tokenizer.encode(column.contents(every[i : i + BATCH_ROWS]), i)
            for i in range(0, len(every), BATCH_ROWS)
        ]
        return PromptTable(pa.Table.from_batches(batches, SCHEMA), every)

    def _fill(self, folder: Path, rows: "datasets.Dataset", cache: PromptCache) -> None:
        """Writes the contents of an entry of the cache."""
        source, column, prompt_tokenizer = self.source, self._column(rows), self._prompt_tokenizer()
        log.info("tokenise %d prompts of %s, for %s", len(rows), source.path, cache.folder)
        report = self.begin("tokenise")

        def parts() -> Iterator[Part]:
            contents = rows.select_columns(column.columns)
            for start in range(0, len(rows), BATCH_ROWS):
                some = contents.select(range(start, min(start + BATCH_ROWS, len(rows))))
                yield column.contents(decode_rows(some, source)), start

        def batches() -> Iterator[pa.RecordBatch]:
            first = column.contents(decode_rows(rows.select([0]), source))[0]
            conversations = self.config.chat or not isinstance(first, str)
            workers = worker_count(len(rows)) if conversations else 0
            done = 0
            for batch in encode_parts(prompt_tokenizer, parts(), workers):
                done += len(batch)
                report(done, len(rows))
                yield batch

        try:
            rows.save_to_disk(str(folder / ROWS))
            with parallel_tokenizers():
                write_batches(folder / PROMPTS, batches())
        except WRITE_ERRORS as error:
            raise cache.not_writable(error) from error

    def _facts(self) -> list[str]:
        """Lists everything besides the files that the set's tokens depend on."""
        config, source = self.config, self.source
        options = {
            "column": source.column,
            "split": source.split,
            "chat": config.chat,
            "system": config.system,
            "template_arguments": config.template_arguments,
            "max_prompt_tokens": config.max_prompt_tokens,  # longer texts are not tokenised
            "suffix": Path(source.path).suffix,
        }
        return [
            json.dumps(options, sort_keys=True, default=str),
            transformers.__version__,
            tokenizers.__version__,
            tokenizer_hash(self.tokenizer),
        ]

    def _usable(self, table: PromptTable, entry: Path | None) -> LoadedSet:
        """Selects the prompts whose lengths are within the limits; logs how many are left out."""
        config, source = self.config, self.source
        table, left_out = within_limits(table, config)
        count = sum(left_out.values())
        if not len(table):
            short, long = config.min_prompt_tokens, config.max_prompt_tokens
            least = f"shorter than data.min_prompt_tokens ({short})" if short > 1 else "empty"
            raise UserInputError(
                f"data.prompts: each of the {count} prompts in {source.path} is {least} or longer "
                f"than data.max_prompt_tokens ({long})"
            )
        if count:
            reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n)
            log.warning("%d of %d prompts left out: %s", count, len(table) + count, reasons)
        return LoadedSet(source, table, entry, left_out)


def _files_of(rows: "datasets.Dataset | None") -> list[Path]:
    """Returns the files from which a data set on the hub is memory-mapped."""
    return [] if rows is None else [Path(file["filename"]) for file in rows.cache_files]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hashes everything that determines a tokenizer's tokens, and its chat template.

    The folder that it was read from is left out, because the tokenizer of a checkpoint is in
    another folder than that of the model.
    """
    found = hashlib.blake2b(digest_size=20)
    settings = (
        type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map,
        tokenizer.eos_token_id,
    )  # fmt: skip
    found.update(json.dumps(settings, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        found.update(backend.to_str().encode())
        return found.hexdigest()
    with TemporaryDirectory(prefix="rlhf-tui-") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def within_limits(table: PromptTable, config: DataConfig) -> tuple[PromptTable, dict[str, int]]:
    """Returns the prompts of a usable length, and how many are left out for which reason."""
    lengths = table.lengths
    long = (lengths > config.max_prompt_tokens) | (lengths < 0)
    empty = lengths == 0
    short = (lengths < config.min_prompt_tokens) & ~long & ~empty
    left_out = {
        "too long": int(long.sum()), "too short": int(short.sum()), "empty": int(empty.sum()),
    }  # fmt: skip
    kept = ~(long | short | empty)
    return (table if kept.all() else table.select(kept)), left_out
