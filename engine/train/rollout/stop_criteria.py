"""Decides when a response ends."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class StopCriteria:
    """Ends a response at an end-of-sequence token, or at a stop string in its text.

    Args:
        eos: end-of-sequence token ids; chat models have several.
        stop: stop strings (`rollout.stop`).
        tokenizer: the policy's.
    """

    def __init__(self, eos: list[int], stop: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._eos = torch.tensor(eos, dtype=torch.int64)
        self._stop = stop
        self._tokenizer = tokenizer
        # A token usually decodes to at least one byte, so this many tokens cover any stop string.
        self._tail = max((len(s.encode()) for s in stop), default=0) + 4

    def eos_ids(self, device: torch.device) -> Tensor:
        """The end-of-sequence token ids on a device; int64."""
        return self._eos.to(device)

    @property
    def has_strings(self) -> bool:
        """Whether there are stop strings."""
        return bool(self._stop)

    def stops_at(self, ids: list[int], first: int) -> int | None:
        """Returns the first position from `first` on where the text has a stop string, or None.

        Args:
            ids: a response's tokens so far.
            first: the first position that has not been searched yet.
        """
        if not self._stop:
            return None
        ends = range(first + 1, len(ids) + 1)
        tails = self._tokenizer.batch_decode([ids[max(0, n - self._tail) : n] for n in ends])
        found = (i for i, tail in enumerate(tails, first) if any(s in tail for s in self._stop))
        return next(found, None)
