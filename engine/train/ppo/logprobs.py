"""Log-probabilities and entropies from logits, without copies of the logits' size."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Logits processed at a time on a CPU: 16 MB of float32, which fits its cache."""
GPU_CHUNK = 1 << 25
"""The same on a GPU, where each chunk costs a few kernel launches: 128 MB of float32."""


LOWEST = -1e4
"""Bound on log p in the entropy. A token that the model forbids has a logit of -∞ and would make
0·(-∞), not a number. Below this p is 0 in float32 anyway, so no other value changes."""


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log softmax(logits/τ) at the tokens: (n, T, V), (n, T) → (n, T), in float32.

    Nothing else may use the logits: the backward pass overwrites them with their gradient, and
    autograd raises an error if another operation still needs them. `log_softmax` would keep two
    more tensors of their size for its backward pass, which allocates a third.
    """
    flat = TokenLogprobs.apply(
        logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1), temperature
    )
    return flat.view(tokens.shape)


def token_logprobs_and_entropies(
    logits: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As :func:`token_logprobs`, with the entropy of softmax(logits/τ) in nats; (n, T) each.

    One function gives both, since its backward pass overwrites the logits with the sum of their
    gradients. Both are float32.
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
        log_sums = torch.empty(len(logits), device=logits.device)
        for chunk in _chunks(logits):
            log_sums[chunk] = _scaled(logits[chunk], temperature).logsumexp(1)
        chosen = logits.gather(1, tokens[:, None]).squeeze(1).float() / temperature
        ctx.save_for_backward(logits, tokens, log_sums)
        ctx.temperature = temperature
        return chosen - log_sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """g·(1[token] − softmax)/τ, written over the logits in chunks."""
        logits, tokens, log_sums = ctx.saved_tensors
        grad = grad / ctx.temperature
        for chunk in _chunks(logits):
            gradient = _scaled(logits[chunk], ctx.temperature) - log_sums[chunk, None]
            gradient.exp_().mul_(-grad[chunk, None])
            gradient.scatter_add_(1, tokens[chunk, None], grad[chunk, None])
            logits[chunk] = gradient
        return logits, None, None


class TokenLogprobsAndEntropies(torch.autograd.Function):
    """Logits (n, V), tokens (n,) → log-probabilities and entropies, (n,) float32 each."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Computes in chunks; saves the logits, and each row's log Σ exp and entropy."""
        log_sums = torch.empty(len(logits), device=logits.device)
        entropies = torch.empty_like(log_sums)
        for chunk in _chunks(logits):
            scaled = _scaled(logits[chunk], temperature)
            log_sums[chunk] = scaled.logsumexp(1)
            logprobs = (scaled - log_sums[chunk, None]).clamp_(min=LOWEST)
            entropies[chunk] = -(logprobs.exp() * logprobs).sum(1)
        chosen = logits.gather(1, tokens[:, None]).squeeze(1).float() / temperature
        ctx.save_for_backward(logits, tokens, log_sums, entropies)
        ctx.temperature = temperature
        return chosen - log_sums, entropies

    @staticmethod
    def backward(ctx: Any, logprob_grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor, None, None]:
        """(g·(1[token] − p) − h·p·(log p + H))/τ, written over the logits in chunks.

        g and h are the gradients of log-probability and entropy; ∂H/∂z = −p·(log p + H)/τ.
        """
        logits, tokens, log_sums, entropies = ctx.saved_tensors
        g, h = logprob_grad / ctx.temperature, entropy_grad / ctx.temperature
        for chunk in _chunks(logits):
            logprobs = _scaled(logits[chunk], ctx.temperature) - log_sums[chunk, None]
            logprobs.clamp_(min=LOWEST)
            factor = (logprobs + entropies[chunk, None]).mul_(h[chunk, None])
            gradient = logprobs.exp_().mul_(factor.add_(g[chunk, None]).neg_())
            gradient.scatter_add_(1, tokens[chunk, None], g[chunk, None])
            logits[chunk] = gradient
        return logits, None, None


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, (GPU_CHUNK if logits.is_cuda else CHUNK) // logits.shape[1])
    return [slice(i, i + size) for i in range(0, len(logits), size)]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    values = logits.float()
    return values if temperature == 1.0 else values / temperature
