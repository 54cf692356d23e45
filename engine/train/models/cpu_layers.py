"""Float32 linear layers and embeddings on a CPU that accumulate their gradients in place.

Linear layers also choose the library for their products (:mod:`engine.train.models.cpu_matmul`).

autograd allocates a gradient of a weight's size for each micro-batch and then adds it to
`weight.grad`; for an embedding tied to the output layer it allocates three. With a single rank,
only the optimiser reads a weight's gradient, so a layer can add its own to `weight.grad` directly.
The largest gradients are the output layer's: 113 MB each for SmolLM2's 135 M, which the kernel
would clear each time.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from engine.train.distributed.ranks import RankGroup
from engine.train.models.cpu_matmul import (
    add_product_,
    blocks_are_quicker_for,
    layer_output,
    onednn_is_quicker_for,
    product,
    quicker_transposed,
    transposed_order,
)


def use_cpu_layers(module: nn.Module, ranks: RankGroup) -> None:
    """Replaces the `forward` of a model's plain linear layers and embeddings where that pays off.

    Also reorders the weights under adapters in memory. Does nothing on a GPU. Call it once the
    model is placed and its trainable weights are chosen. With a single rank, the backward pass sets
    `weight.grad` directly and autograd gets no gradient of the weight: neither
    `torch.autograd.grad` nor a hook on the weight sees one.
    """
    if ranks.device.type != "cpu":
        return
    # Not those of a reference: its products must round like the policy's, so that the KL before the
    # first update is 0.
    if any(p.requires_grad for p in module.parameters()):
        for layer in quicker_transposed(module.modules()):
            if not layer.weight.requires_grad:
                layer.weight.data = transposed_order(layer.weight)
    for part in module.modules():
        # Exact types only: subclasses may compute something else.
        if type(part) is nn.Linear:
            forward = _linear_forward(part.weight, alone=ranks.size == 1)
        elif type(part) is nn.Embedding:
            learns = ranks.size == 1 and part.weight.requires_grad
            forward = _in_place_embedding if learns and _is_plain(part) else None
        else:
            continue
        if forward is not None:
            part.forward = types.MethodType(forward, part)  # type: ignore[method-assign]  # of this layer only


def _linear_forward(weight: Tensor, *, alone: bool) -> Callable[..., Tensor] | None:
    """Returns the replacement of a linear layer's `forward`; None to keep it."""
    in_place = alone and weight.requires_grad
    if onednn_is_quicker_for(weight):
        return _in_place_onednn_linear if in_place else _onednn_linear
    return _in_place_linear if in_place else None


def _is_plain(layer: nn.Embedding) -> bool:
    return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse


# Each rollout token calls each layer once, for about 0.3 ms. The code before the product must be
# short: meanwhile the threads of the previous product fall asleep.


def _in_place_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or blocks_are_quicker_for(x, layer.weight):
        return _linear(layer, x, in_place=True)
    return linear(x, layer.weight, layer.bias)


def _in_place_onednn_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _linear(layer, x, in_place=True)


def _onednn_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _linear(layer, x, in_place=False)


def _linear(layer: nn.Linear, x: Tensor, *, in_place: bool) -> Tensor:
    """`nn.Linear.forward`, with custom products for plain float32 tensors on the CPU."""
    weight, bias = layer.weight, layer.bias
    plain = x.dtype == weight.dtype == torch.float32 and _is_on_cpu(weight)
    if not plain or not x.numel() or torch.is_autocast_enabled("cpu"):
        return linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = LinearFunction.apply(flat, weight, in_place)
    else:
        y = layer_output(flat, weight)
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _in_place_embedding(layer: nn.Embedding, ids: Tensor) -> Tensor:
    weight = layer.weight
    if torch.is_grad_enabled() and weight.requires_grad and _is_on_cpu(weight):
        return InPlaceEmbedding.apply(ids, weight, layer.padding_idx)
    return embedding(ids, weight, layer.padding_idx)


def _is_on_cpu(weight: Tensor) -> bool:
    """Whether it is a plain tensor on the CPU, neither sharded nor quantised."""
    return weight.device.type == "cpu" and type(weight.data) is Tensor


class LinearFunction(torch.autograd.Function):
    """The product x Wᵀ of x (n, i) and W (o, i) in float32, shape (n, o)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, in_place: bool) -> Tensor:
        """Saves x and keeps a reference to the weight, which must not change before backward."""
        ctx.save_for_backward(x)
        ctx.weight, ctx.in_place = weight, in_place
        return layer_output(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Returns the gradients g W and gᵀ x, or None for the latter if added to `weight.grad`."""
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad = grad.contiguous()
        of_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight: Tensor | None = None
        if ctx.needs_input_grad[1]:
            if not ctx.in_place:
                of_weight = product(grad.t(), x.t())
            elif weight.grad is None:
                weight.grad = product(grad.t(), x.t())
            else:
                add_product_(weight.grad, grad.t(), x.t())
        return of_x, of_weight, None


class InPlaceEmbedding(torch.autograd.Function):
    """Looks up rows of a weight (V, H) by ids of any shape; adds the gradient to `weight.grad`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        """Saves the ids. The row `padding` has no gradient, as in `nn.Embedding`."""
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return embedding(ids, weight, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        """Returns no gradients."""
        (ids,), weight = ctx.saved_tensors, ctx.weight
        ids, rows = ids.flatten(), grad.flatten(0, -2)
        if ctx.padding is not None:
            learns = ids != ctx.padding
            ids, rows = ids[learns], rows[learns]
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows)
        return None, None, None
