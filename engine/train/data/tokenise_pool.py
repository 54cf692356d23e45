"""Tokenises in several processes: chat templates are rendered by Python, one at a time in each."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pyarrow as pa

from engine.launch.parent_death import PARENT_VARIABLE, die_with_parent
from engine.train.data.tokenise import PARALLEL_VARIABLE, PromptTokenizer

MOST_WORKERS = 8
"""Each imports what tokenizers need: seconds of a processor, and some 300 MB."""
WORTHWHILE = 50_000
"""Conversations from which processes of their own save time."""

Part = tuple[list[Any], int]
"""Prompts, and the number of the first one's row."""

_tokenizer: PromptTokenizer | None = None
"""A worker's."""


def worker_count(prompts: int) -> int:
    """How many processes to tokenise conversations in; 0 for the process itself."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, MOST_WORKERS) if prompts >= WORTHWHILE and cores > 1 else 0


def encode_parts(
    tokenizer: PromptTokenizer, parts: Iterable[Part], workers: int
) -> Iterator[pa.RecordBatch]:
    """Tokenises parts of a data set, in order.

    Args:
        tokenizer: what does it.
        parts: read as they are needed.
        workers: from :func:`worker_count`.

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
