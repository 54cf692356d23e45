"""Makes a frozen model with bfloat16 weights compute like one with float32 weights."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import layer_norm


def keep_hidden_states_float32(module: nn.Module) -> None:
    """Makes the embeddings return float32, so that hidden states between products are float32.

    Autocast only casts the inputs of matrix products. The policy's embeddings and norms have
    float32 weights, so its hidden states are also float32. A reference with only bfloat16 weights
    would add and normalise bfloat16 hidden states, and differ from a policy with the same weights
    by 0.01 to 0.02 nats per token. This function makes both compute the same function, bit for bit
    if the model's files have bfloat16 weights. Experts are an exception: transformers computes
    their products in the dtype of their weights, with or without autocast.

    With FSDP this is not needed: it gathers all weights, including the policy's, in the compute
    dtype.

    Args:
        module: the model, in `torch.bfloat16`, its weights possibly on the meta device. Changed in
            place; the weights keep their dtype.
    """
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_hook(_in_float32)
        elif type(part) is nn.LayerNorm and "forward" not in vars(part):
            # Other norms multiply by their weight, which takes mixed dtypes; on a CPU this does
            # not.
            part.forward = partial(_layer_norm_in_float32, part)  # type: ignore[method-assign]


def _in_float32(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()


def _layer_norm_in_float32(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if p is None else p.float() for p in (layer.weight, layer.bias))
    return layer_norm(x.float(), layer.normalized_shape, weight, bias, layer.eps)
