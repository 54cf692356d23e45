"""Computes log-probabilities and losses from hidden states, a chunk of logits at a time.

The logits of n responses of T tokens are n·T·V numbers: 1.2 GB for 2,000 tokens and a vocabulary of
152,000. If there would be more than :data:`MAX_LOGITS`, they are computed for a chunk of tokens at
a time. A sum of per-token losses is differentiated chunk by chunk in the forward pass, so that the
backward pass needs no logits: recomputing them there took 15–35 % longer. Only the ratios of whole
responses (`ppo.ratio`), on which every token's loss depends, require computing logits twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.memory.model import LOGITS_AT_ONCE
from engine.train.models.cpu_matmul import add_product_, layer_output, product
from engine.train.models.output_layer import AfterLayer, OutputLayer
from engine.train.ppo.logprobs import (
    TokenLogprobs,
    TokenLogprobsAndEntropies,
    overwrite_with_gradient,
    row_sums,
    scaled_at,
)

MAX_LOGITS = LOGITS_AT_ONCE["cpu"]
"""Most logits in memory at a time on a CPU. A micro-batch with fewer is computed in one piece, for
example with the starter's vocabulary, or up to 682 tokens with SmolLM2's 49,152."""
MAX_LOGITS_ON_GPU = LOGITS_AT_ONCE["cuda"]
"""The same on a GPU. With smaller chunks, summing the weight gradients would be memory-bound."""


def most_logits(device: torch.device) -> int:
    """Returns the number of logits that may be in memory at a time."""
    return MAX_LOGITS_ON_GPU if device.type == "cuda" else MAX_LOGITS


def chunks(tokens: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Splits tokens so that each chunk has at most :func:`most_logits` logits."""
    size = max(1, most_logits(device) // vocabulary)
    return (slice(i, min(i + size, tokens)) for i in range(0, tokens, size))


def chunked_logprobs(
    output: OutputLayer, hidden: Tensor, tokens: Tensor, temperature: float, *, entropies: bool
) -> tuple[Tensor, ...]:
    """Computes log-probabilities of tokens without gradients.

    Args:
        output: the output layer.
        hidden: its input, (n, T, H).
        tokens: (n, T) int64.
        temperature: divides the logits; > 0.
        entropies: whether to compute them.

    Returns:
        The log-probabilities and, if requested, the entropies in nats; (n, T) float32 each.
    """
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    function = TokenLogprobsAndEntropies if entropies else TokenLogprobs
    found = torch.empty(2 if entropies else 1, len(flat), device=hidden.device)
    for chunk in chunks(len(flat), output.vocabulary, hidden.device):
        results = function.apply(output.logits(flat[chunk]), ids[chunk], temperature)
        for row, result in zip(found, results if entropies else (results,), strict=True):
            row[chunk] = result
    return tuple(row.view(tokens.shape) for row in found)


LossOfTokens = Callable[[slice | None, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Called with a chunk of the tokens (None for all of them), their log-probabilities, (tokens of the
chunk,) float32, and their entropies if requested. Returns the sum of their losses, a scalar with
gradient, and other sums, (k,) float64."""


@dataclass(frozen=True)
class ChunkedLoss:
    """A token loss as a function of the output layer's input."""

    loss: LossOfTokens
    separable: bool
    """Whether the loss is a sum of per-token terms, each depending on one token only."""
    tokens: Tensor
    """(n, T) int64."""
    temperature: float
    entropies: bool

    def __call__(self, output: OutputLayer, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the loss, a scalar with gradient, and its sums, (k,) float64, from (n, T, H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            flat = hidden.reshape(-1, hidden.shape[-1]).to(output.compute)
            layer = output.layer
            loss, sums = _LossFunction.apply(flat, layer.weight, layer.bias, output, self)
        return loss, sums


class _LossFunction(torch.autograd.Function):
    """Hidden states (N, H), weight (V, H), bias (V,) or None → loss and sums."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: OutputLayer,
        task: ChunkedLoss,
    ) -> tuple[Tensor, Tensor]:
        """Also computes the gradients and saves them."""
        work = _Pass(hidden, weight, bias, output.after or AfterLayer(), task)
        needed = ctx.needs_input_grad
        loss, sums = work.run(*needed[:3])
        ctx.save_for_backward(work.hidden_grad, work.weight_grad, work.bias_grad)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, _sums: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Scales the saved gradients in place, so a graph supports only one backward pass."""
        of_hidden, of_weight, of_bias = (
            None if g is None else _scaled(g, grad).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return of_hidden, of_weight, of_bias, None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a gradient by a scalar, in float32 (bfloat16 would be off by 0.2 %)."""
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor)
    return gradient.to(factor.dtype) * factor


class _Pass:
    """The forward pass of :class:`_LossFunction`, and the gradients that it accumulates."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        after: AfterLayer,
        task: ChunkedLoss,
    ) -> None:
        self._hidden, self._after, self._task = hidden, after, task
        self._weight = weight.to(hidden.dtype)
        self._bias = None if bias is None else bias.to(hidden.dtype)
        self._tokens = task.tokens.reshape(-1)
        self.hidden_grad: Tensor | None = None
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None

    def run(self, of_hidden: bool, of_weight: bool, of_bias: bool) -> tuple[Tensor, Tensor]:
        """Computes the loss and the sums; the arguments select the gradients to compute."""
        if of_hidden:
            self.hidden_grad = torch.empty_like(self._hidden)
        if of_weight:  # in float32, also where the products or the weight are in bfloat16
            self.weight_grad = self._weight.new_zeros(self._weight.shape, dtype=torch.float32)
        if of_bias and self._bias is not None:
            self.bias_grad = torch.zeros(len(self._bias), device=self._bias.device)
        parts = list(chunks(len(self._hidden), len(self._weight), self._hidden.device))
        if self._task.separable:
            found = [self._add(part) for part in parts]
            return sum_of([f[0] for f in found]), sum_of([f[1] for f in found])
        logprobs = torch.empty(len(self._hidden), device=self._hidden.device)
        entropies = torch.empty_like(logprobs) if self._task.entropies else None
        for part in parts:
            logits = self._logits(part)
            logprobs[part], ents, _ = self._logprobs(logits, part)
            if entropies is not None:
                entropies[part] = ents
            del logits
        loss, sums, gradients = self._loss(None, logprobs, entropies)
        for part in parts:
            logits = self._logits(part)
            _, ents, log_sums = self._logprobs(logits, part)
            mine = tuple(None if g is None else g[part] for g in gradients)
            self._accumulate(part, logits, log_sums, ents, mine)
            del logits
        return loss, sums

    def _add(self, part: slice) -> tuple[Tensor, Tensor]:
        """Computes a chunk's loss and sums, and accumulates its gradients."""
        logits = self._logits(part)
        logprobs, entropies, log_sums = self._logprobs(logits, part)
        loss, sums, gradients = self._loss(
            part, logprobs, entropies if self._task.entropies else None
        )
        self._accumulate(part, logits, log_sums, entropies, gradients)
        return loss, sums

    def _logits(self, part: slice) -> Tensor:
        logits = layer_output(self._hidden[part], self._weight)
        return self._after.apply_(logits if self._bias is None else logits.add_(self._bias))

    def _logprobs(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies (if requested) and log Σ exp, (c,) float32 each."""
        temperature = self._task.temperature
        log_sums, entropies = row_sums(logits, temperature, entropies=self._task.entropies)
        return scaled_at(logits, self._tokens[part], temperature) - log_sums, entropies, log_sums

    def _loss(
        self, part: slice | None, logprobs: Tensor, entropies: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Loss, sums, and the loss's gradients with respect to log-probabilities and entropies."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (logprobs, entropies) if x is not None]
            loss, sums = self._task.loss(part, leaves[0], leaves[1] if len(leaves) > 1 else None)
            gradients = torch.autograd.grad(loss, leaves)
        return loss.detach(), sums, (*gradients, None)[:2]

    def _accumulate(
        self,
        part: slice,
        logits: Tensor,
        log_sums: Tensor,
        entropies: Tensor,
        gradients: tuple[Tensor | None, ...],
    ) -> None:
        """Accumulates a chunk's gradients; overwrites its logits."""
        of_logprobs, of_entropies = gradients
        if of_logprobs is None:
            raise ValueError("the loss does not depend on the log-probabilities")
        both = None if of_entropies is None else (entropies, of_entropies)
        overwrite_with_gradient(
            logits, self._tokens[part], self._task.temperature, log_sums, of_logprobs, both,
            self._after,
        )  # fmt: skip
        if self.hidden_grad is not None:
            self.hidden_grad[part] = product(logits, self._weight.t())
        if self.weight_grad is not None:
            add_product_(self.weight_grad, logits.t(), self._hidden[part].t())
        if self.bias_grad is not None:
            self.bias_grad += logits.sum(0, dtype=torch.float32)


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape, in order."""
    return torch.stack(tensors).sum(0)
