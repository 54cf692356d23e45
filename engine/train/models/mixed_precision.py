"""A frozen model with bfloat16 weights that computes what one with float32 weights would."""

from typing import Any

import torch
from torch import Tensor, nn


def keep_hidden_states_float32(module: nn.Module) -> None:
    """Has embeddings return float32 and holds vectors of weights in float32.

    Autocast casts the inputs of matrix products only. The policy's embeddings and norms have
    float32 weights, so its hidden states are float32, too. A reference whose weights are all
    bfloat16 would add and normalise bfloat16 hidden states, and differ from a policy with the same
    weights by 0.01 to 0.02 nats a token. With this both compute the same function, bit for bit if
    the model's files have bfloat16 weights. Experts are an exception: transformers computes their
    products in the dtype of their weights, autocast or not.

    FSDP gathers all weights in the compute dtype, the policy's too: the two agree without this.

    Args:
        module: the model, in `torch.bfloat16` or `torch.float16`, its weights possibly on the meta
            device. Changed in place.
    """
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_hook(_in_float32)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.to(torch.float32)


def _in_float32(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()
