"""Frees the memory of an engine on the trainer's GPUs while the trainer needs it.

This code has never run: vLLM's sleep mode needs a GPU. tests/vllm compares the calls with vLLM's
signatures.
"""

from typing import Any

WEIGHTS, CACHE = "weights", "kv_cache"
"""vLLM's tags for the memory that it frees."""


class SleepMode:
    """Calls vLLM's sleep mode at the right moments; does nothing at level 0.

    At level 1 the weights are kept in host memory; at level 2 they must be sent again. The cache is
    kept at neither level, since it is empty before each batch.
    """

    def __init__(self, llm: Any, level: int) -> None:
        """`llm` must have been made with `enable_sleep_mode` if `level` is not 0."""
        self._llm = llm
        self._level = level
        self._asleep: list[str] = []
        """The tags of memory that is not allocated."""

    @property
    def forgets_weights(self) -> bool:
        """Whether the weights must be sent again after each batch."""
        return self._level == 2

    def before_load(self) -> None:
        """Allocates the weights, but not yet the cache."""
        self._wake(WEIGHTS)

    def before_generate(self) -> None:
        """Allocates whatever is not allocated yet."""
        self._wake(WEIGHTS)
        self._wake(CACHE)

    def after_generate(self) -> None:
        """Frees the memory of weights and cache."""
        if self._level and not self._asleep:
            self._llm.sleep(level=self._level)
            self._asleep = [WEIGHTS, CACHE]

    def _wake(self, tag: str) -> None:
        if tag in self._asleep:
            self._llm.wake_up(tags=[tag])
            self._asleep.remove(tag)
