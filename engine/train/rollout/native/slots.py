"""Slots: rows that are generated together, each holding one response."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.rollout import Rollout, assemble
from engine.train.rollout.sampling import Distribution, sample


class Responses:
    """The tokens sampled so far for each of B responses, on the device.

    An extra row collects the output of slots without a response.
    """

    def __init__(
        self,
        request: RolloutRequest,
        eos: Tensor,
        sampling: str,
        distribution: Callable[[Tensor, float], Distribution],
    ) -> None:
        """Allocates the tensors.

        Args:
            request: on the device.
            eos: the end-of-sequence token ids; int64, on the device.
            sampling: the scheme; a name in :data:`~engine.train.rollout.sampling.SCHEMES`.
            distribution: see :func:`~engine.train.rollout.sampling.sample`.
        """
        self.request = request
        self.count, self.limit = request.uniforms.shape
        """B, and T, the maximum number of new tokens."""
        device, limits = request.uniforms.device, request.limits
        limits = torch.full((self.count,), self.limit) if limits is None else limits
        self.limits = limits.to(device)
        """(B,) int64."""
        self.eos = eos
        self.sampling = sampling
        self.distribution = distribution
        self.ids = torch.zeros(self.count + 1, self.limit, dtype=torch.int64, device=device)
        self.floats = torch.zeros(3, self.count + 1, self.limit, device=device)

    def is_eos(self, tokens: Tensor) -> Tensor:
        """Whether each token, (n,) int64, is an end-of-sequence token; (n,) bool."""
        return (tokens[:, None] == self.eos).any(1)

    def rollout(
        self, lengths: list[int], stopped: list[bool], tokenizer: PreTrainedTokenizerBase
    ) -> Rollout:
        """Returns the finished rollout.

        Args:
            lengths: length of each response, at least 1.
            stopped: whether a stop string ended each response; tokens after it may have been
                sampled.
            tokenizer: the model's.
        """
        device = self.ids.device
        facts = torch.tensor([lengths, [int(s) for s in stopped]]).to(device)
        ids, floats = self.ids[:-1], self.floats[:, :-1]
        if any(stopped):
            beyond = torch.arange(self.limit, device=device) >= facts[0][:, None]
            ids, floats = ids.masked_fill(beyond, 0), floats.masked_fill(beyond, 0.0)
        eos = self.is_eos(ids.gather(1, facts[0][:, None] - 1).squeeze(1))
        ended = eos | facts[1].bool()
        return assemble(self.request.batch, ids, facts[0], eos, ended, floats, tokenizer)


@dataclass
class Slots:
    """n slots. Tensors are (n,) on the device; all but `start` change in place with each token."""

    row: Tensor
    """int64: index of the slot's response."""
    prompt_length: Tensor
    """int64: number of prompt tokens."""
    start: Tensor
    """int64: start of the prompt in the cache."""
    token_count: Tensor
    """int64: number of sampled tokens."""
    done: Tensor
    """bool: whether the response has ended; further output of the slot is discarded."""
    token: Tensor
    """int64: the last token sampled."""
    limit: Tensor
    """int64: maximum number of tokens to sample."""

    @classmethod
    def of(cls, responses: Responses, rows: Tensor, end: int) -> "Slots":
        """Creates slots for responses whose prompts end before position `end` of the cache."""
        prompt_length = responses.request.batch.lengths[rows]
        zeros = torch.zeros_like(rows)
        return cls(
            rows.clone(), prompt_length, end - prompt_length, zeros, zeros.bool(), zeros.clone(),
            responses.limits[rows],
        )  # fmt: skip

    @property
    def position(self) -> Tensor:
        """The position of `token` in its sequence; int64."""
        return self.prompt_length + self.token_count - 1

    def sample(self, responses: Responses, logits: Tensor, values: Tensor | None) -> None:
        """Samples each slot's next token, and stores it unless the slot has ended.

        It never synchronises with the host and has fixed shapes, so a CUDA graph can capture it.

        Args:
            responses: stores the tokens.
            logits: (n, V).
            values: (n,) float32, or None.
        """
        at = self.token_count.clamp(max=responses.limit - 1)
        uniforms = responses.request.uniforms[self.row, at]
        token, logprob, entropy = sample(
            logits,
            uniforms,
            responses.request.temperature,
            responses.sampling,
            responses.distribution,
        )
        row = self.row.masked_fill(self.done, responses.count)
        responses.ids[row, at] = token
        kept = [logprob, entropy] if values is None else [logprob, entropy, values]
        responses.floats[: len(kept), row, at] = torch.stack(kept)
        self.token.copy_(token)
        self.token_count.add_(~self.done)
        self.done.logical_or_(responses.is_eos(token))
        self.done.logical_or_(self.token_count >= self.limit)

    def to_host(self) -> tuple[list[int], list[bool]]:
        """Returns each slot's token count and whether it has ended. Waits for the device."""
        counts, done = torch.stack([self.token_count, self.done.long()]).tolist()
        return counts, [bool(d) for d in done]

    def overwrite(self, slots: Tensor, other: "Slots") -> None:
        """Overwrites the given slots with others."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[slots] = getattr(other, name)

    def select(self, slots: Tensor) -> "Slots":
        """Returns copies of the given slots."""
        return Slots(*(getattr(self, name)[slots] for name in self.__dataclass_fields__))
