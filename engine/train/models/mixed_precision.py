"""Makes a frozen model with bfloat16 weights compute like one with float32 weights."""

from typing import Any

import torch
from torch import Tensor, nn


def keep_hidden_states_float32(module: nn.Module) -> None:
    """Makes embeddings return float32 and stores weight vectors in float32.

    Autocast only casts the inputs of matrix products. The policy's embeddings and norms have
    float32 weights, so its hidden states are also float32. A reference with only bfloat16 weights
    would add and normalise bfloat16 hidden states, and differ from a policy with the same weights
    by 0.01 to 0.02 nats per token. This function makes both compute the same function, bit for bit
    if the model's files have bfloat16 weights. Experts are an exception: transformers computes
    their products in the dtype of their weights, with or without autocast.

    With FSDP this is not needed: it gathers all weights, including the policy's, in the compute
    dtype.

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
