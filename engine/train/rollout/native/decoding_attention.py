"""Attention of one token per row for decoding, as a transformers attention function."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DECODING_ATTENTION = "rlhf_tui_decoding"
"""The name of :func:`decoding_attention` among transformers' attention functions."""


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Computes attention of one query per row by two products, with the softmax in float32.

    On a GPU, the masked kernels behind `scaled_dot_product_attention` parallelise over queries.
    With a single query they leave most of the GPU idle. All other cases are passed on to them.

    Args:
        module: the calling layer.
        query: (n, heads, q, width).
        key: (n, key heads, L, width).
        value: (n, key heads, L, width of values).
        attention_mask: (n, 1, q, L) bool, or any mask accepted by transformers' `sdpa`.
        dropout: must be 0, as in evaluation mode.
        scaling: factor on the scores.
        keywords: further arguments of transformers' `sdpa`.

    Returns:
        (n, q, heads, width of values), and None in place of the attention weights.
    """
    count, heads, queries, width = query.shape
    special = any(keywords.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if (
        attention_mask is None or attention_mask.dtype != torch.bool
        or queries != 1 or dropout or special
    ):  # fmt: skip
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    shared = key.shape[1]
    grouped = query.reshape(count * shared, heads // shared, width).to(key.dtype)
    keys = key.flatten(0, 1).transpose(1, 2)
    if key.is_cuda and key.dtype != torch.float32:
        scores = torch.bmm(grouped, keys, out_dtype=torch.float32)
    else:
        scores = torch.bmm(grouped, keys).float()
    scores = scores.view(count, shared, heads // shared, -1)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    scores = scores.masked_fill(~attention_mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1).to(value.dtype).flatten(0, 1)
    mixed = torch.bmm(weights, value.flatten(0, 1))
    return mixed.view(count, 1, heads, value.shape[-1]), None


AttentionInterface.register(DECODING_ATTENTION, decoding_attention)
AttentionMaskInterface.register(DECODING_ATTENTION, sdpa_mask)
