"""When a response ends."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class StopCriteria:
    """Tells when an answer is over: an end-of-sequence token, or a stop string in its text."""

    def __init__(self, eos: list[int], stop: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._eos = torch.tensor(eos, dtype=torch.int64)
        self._stop = stop
        self._tokenizer = tokenizer
        # A token carries at least one byte as a rule, so this many hold any stop string.
        self._tail = max((len(s.encode()) for s in stop), default=0) + 4

    def is_eos(self, tokens: Tensor) -> Tensor:
        """(n,) bool for (n,) tokens."""
        return torch.isin(tokens, self._eos.to(tokens.device))

    def stops(self, ids: Tensor, length: int) -> Tensor:
        """(n,) bool: whether a stop string stands at the end of ids[:, :length]."""
        if not self._stop:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        tails = self._tokenizer.batch_decode(ids[:, max(0, length - self._tail) : length])
        found = [any(s in tail for s in self._stop) for tail in tails]
        return torch.tensor(found, device=ids.device)
