"""Computes log-probabilities and entropies from logits without copying the logits."""

from typing import Any

import torch
from torch import Tensor

from engine.memory.model import LOGITS_PIECE
from engine.train.models.output_layer import AfterLayer

CHUNK, GPU_CHUNK = LOGITS_PIECE["cpu"], LOGITS_PIECE["cuda"]
"""Logits processed at a time, on a CPU and on a GPU."""


MIN_LOGPROB = -1e4
"""Lower bound on log p in the entropy. A token that the model forbids has a logit of -∞ and would
give 0·(-∞) = NaN. Below the bound p is 0 in float32 anyway, so no other value changes."""


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log softmax(logits/τ) at the tokens: (n, T, V), (n, T) → (n, T), in float32.

    Nothing else may use the logits: the backward pass overwrites them with their gradient, and
    autograd raises an error if another operation still needs them. `log_softmax` would keep two
    more tensors of the same size for its backward pass, which would allocate a third.
    """
    flat = TokenLogprobs.apply(
        logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1), temperature
    )
    return flat.view(tokens.shape)


def token_logprobs_and_entropies(
    logits: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Like :func:`token_logprobs`, plus entropies of softmax(logits/τ) in nats; (n, T) float32.

    One function computes both, since its backward pass overwrites the logits with the sum of both
    gradients.
    """
    logprobs, entropies = TokenLogprobsAndEntropies.apply(
        logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1), temperature
    )
    return logprobs.view(tokens.shape), entropies.view(tokens.shape)


class TokenLogprobs(torch.autograd.Function):
    """Logits (n, V), tokens (n,) → log-probabilities (n,) float32. See :func:`token_logprobs`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """Computes in chunks; saves the logits and each row's log Σ exp."""
        log_sums, _ = row_sums(logits, temperature)
        ctx.save_for_backward(logits, tokens, log_sums)
        ctx.temperature = temperature
        return scaled_at(logits, tokens, temperature) - log_sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Returns the logits, overwritten with their gradient."""
        logits, tokens, log_sums = ctx.saved_tensors
        overwrite_with_gradient(logits, tokens, ctx.temperature, log_sums, grad)
        return logits, None, None


class TokenLogprobsAndEntropies(torch.autograd.Function):
    """Logits (n, V), tokens (n,) → log-probabilities and entropies, (n,) float32 each."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Computes in chunks; saves the logits, and each row's log Σ exp and entropy."""
        log_sums, entropies = row_sums(logits, temperature, entropies=True)
        ctx.save_for_backward(logits, tokens, log_sums, entropies)
        ctx.temperature = temperature
        return scaled_at(logits, tokens, temperature) - log_sums, entropies

    @staticmethod
    def backward(ctx: Any, logprob_grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor, None, None]:
        """Returns the logits, overwritten with the sum of both gradients."""
        logits, tokens, log_sums, entropies = ctx.saved_tensors
        overwrite_with_gradient(
            logits, tokens, ctx.temperature, log_sums, logprob_grad, (entropies, entropy_grad)
        )
        return logits, None, None


def scaled_at(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Logits/τ at the tokens: (n, V), (n,) → (n,) float32."""
    return logits.gather(1, tokens[:, None]).squeeze(1).float() / temperature


def row_sums(
    logits: Tensor, temperature: float, *, entropies: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes log Σ exp(logits/τ) and the entropy of each row, (n,) float32 each.

    Without `entropies` the second tensor is uninitialised.
    """
    log_sums = torch.empty(len(logits), device=logits.device)
    found = torch.empty_like(log_sums)
    for chunk in _chunks(logits):
        scaled = _scaled(logits[chunk], temperature)
        log_sums[chunk] = scaled.logsumexp(1)
        if entropies:
            logprobs = (scaled - log_sums[chunk, None]).clamp_(min=MIN_LOGPROB)
            found[chunk] = -(logprobs.exp() * logprobs).sum(1)
    return log_sums, found


def overwrite_with_gradient(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    log_sums: Tensor,
    logprob_grad: Tensor,
    entropies_and_grad: tuple[Tensor, Tensor] | None = None,
    after: AfterLayer | None = None,
) -> None:
    """Overwrites the logits with (g·(1[token] − p) − h·p·(log p + H))/τ, in chunks.

    g and h are the gradients with respect to log-probability and entropy; ∂H/∂z = −p·(log p + H)/τ.

    Args:
        logits: (n, V).
        tokens: (n,).
        temperature: τ.
        log_sums: from :func:`row_sums`.
        logprob_grad: g, (n,) float32.
        entropies_and_grad: H and h, (n,) float32 each, if entropies have a gradient.
        after: if given, computes the gradient with respect to the output layer's result instead.
    """
    g = logprob_grad / temperature
    h = None if entropies_and_grad is None else entropies_and_grad[1] / temperature
    for chunk in _chunks(logits):
        gradient = _scaled(logits[chunk], temperature) - log_sums[chunk, None]
        if entropies_and_grad is None or h is None:
            gradient.exp_().mul_(-g[chunk, None])
        else:
            gradient.clamp_(min=MIN_LOGPROB)
            factor = (gradient + entropies_and_grad[0][chunk, None]).mul_(h[chunk, None])
            gradient = gradient.exp_().mul_(factor.add_(g[chunk, None]).neg_())
        gradient.scatter_add_(1, tokens[chunk, None], g[chunk, None])
        if after is not None:
            after.scale_gradient_(gradient, logits[chunk])
        logits[chunk] = gradient


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, (GPU_CHUNK if logits.is_cuda else CHUNK) // logits.shape[1])
    return [slice(i, i + size) for i in range(0, len(logits), size)]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    values = logits.float()
    return values if temperature == 1.0 else values / temperature
