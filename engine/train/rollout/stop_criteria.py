"""When a response ends."""

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

    def is_eos(self, tokens: Tensor) -> Tensor:
        """Which of the (n,) tokens end a sequence; (n,) bool."""
        return torch.isin(tokens, self._eos.to(tokens.device))

    def stops(self, ids: Tensor, length: int) -> Tensor:
        """Which rows of ids[:, :length] have a stop string in their last tokens; (n,) bool."""
        if not self._stop:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        tails = self._tokenizer.batch_decode(ids[:, max(0, length - self._tail) : length])
        found = [any(s in tail for s in self._stop) for tail in tails]
        return torch.tensor(found, device=ids.device)
