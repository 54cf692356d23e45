"""Log-probabilities of tokens from logits, without copies of (tokens, vocabulary)."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Logits looked at together: 16 MB of float32, which stays in a CPU's cache."""
GPU_CHUNK = 1 << 25
"""On a GPU, where each piece costs a few launches: 128 MB."""


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log softmax(logits/τ) at the tokens: (n, T, V), (n, T) → (n, T), in float32.

    The logits must be used for nothing else: the backward pass writes their gradient over them
    (autograd notices, and refuses, where something else needs them still). log_softmax would keep
    two more tensors of their size, and its backward a third.
    """
    flat = TokenLogprobs.apply(
        logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1), temperature
    )
    return flat.view(tokens.shape)


class TokenLogprobs(torch.autograd.Function):
    """Of flat logits (n, V) and tokens (n,): log-probabilities (n,) float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """One pass in pieces; keeps the logits and log Σ exp of each row."""
        total = torch.empty(len(logits), device=logits.device)
        for part in _pieces(logits):
            total[part] = _scaled(logits[part], temperature).logsumexp(1)
        chosen = logits.gather(1, tokens[:, None]).squeeze(1).float() / temperature
        ctx.save_for_backward(logits, tokens, total)
        ctx.temperature = temperature
        return chosen - total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """g·(1[token] − softmax)/τ, written over the logits piece by piece."""
        logits, tokens, total = ctx.saved_tensors
        grad = grad / ctx.temperature
        for part in _pieces(logits):
            piece = _scaled(logits[part], ctx.temperature) - total[part, None]
            piece.exp_().mul_(-grad[part, None])
            piece.scatter_add_(1, tokens[part, None], grad[part, None])
            logits[part] = piece
        return logits, None, None


def _pieces(logits: Tensor) -> list[slice]:
    size = max(1, (GPU_CHUNK if logits.is_cuda else CHUNK) // logits.shape[1])
    return [slice(i, i + size) for i in range(0, len(logits), size)]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    values = logits.float()
    return values if temperature == 1.0 else values / temperature
