"""Tokenises in several processes, because Python renders one chat template at a time."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pyarrow as pa

from engine.launch.parent_death import PARENT_VARIABLE, die_with_parent
from engine.train.data.tokenise import PARALLEL_VARIABLE, PromptTokenizer

MAX_WORKERS = 8
"""Each imports the tokenizer's modules, which takes seconds of processor time and some 300 MB."""
MIN_CONVERSATIONS = 50_000
"""Number of conversations from which on several processes save time."""

Part = tuple[list[Any], int]
"""Prompts, and the row of the first one."""

_tokenizer: PromptTokenizer | None = None
"""The tokenizer of a worker process."""


def worker_count(prompts: int) -> int:
    """Returns the number of processes in which to tokenise; 0 for the process itself."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, MAX_WORKERS) if prompts >= MIN_CONVERSATIONS and cores > 1 else 0


def encode_parts(
    tokenizer: PromptTokenizer, parts: Iterable[Part], workers: int
) -> Iterator[pa.RecordBatch]:
    """Tokenises parts of a data set, in order.

    Args:
        tokenizer: tokenises each part.
        parts: parts of the data set, consumed as they are needed.
        workers: the number of processes, from :func:`worker_count`.

    Raises:
        UserInputError: see :meth:`PromptTokenizer.encode`.
    """
    if not workers:
        for contents, first_row in parts:
            yield tokenizer.encode(contents, first_row)
        return
    # A fork would copy the locks that a rank's threads hold at that moment.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[pa.RecordBatch]] = deque()
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(tokenizer, os.getpid())
    ) as pool:
        for part in parts:
            waiting.append(pool.submit(_encode, part))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _begin(tokenizer: PromptTokenizer, parent: int) -> None:
    global _tokenizer  # noqa: PLW0603 - what a worker is given once
    os.environ |= {PARENT_VARIABLE: str(parent), PARALLEL_VARIABLE: "false"}
    die_with_parent()
    _tokenizer = tokenizer


def _encode(part: Part) -> pa.RecordBatch:
    if _tokenizer is None:
        raise RuntimeError("the worker has not begun")
    return _tokenizer.encode(*part)
