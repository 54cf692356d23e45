"""Matrix products on a CPU, by the library that is quickest on it.

torch's float32 products go to MKL, which on processors that are not Intel's takes its AVX2 path:
on one with AVX-512 that is half of what oneDNN, which torch brings too, gets out of it (measured:
210 and 480 GFLOP/s on two Zen 5 cores, for every shape of a step's products, forward and backward).
Results agree to rounding; the choice depends on the processor alone, so a resumed run makes it
again.
"""

import functools
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def onednn_is_quicker() -> bool:
    """Whether this machine is one of those."""
    cpus = Path("/proc/cpuinfo")
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and cpus.is_file()
        and "GenuineIntel" not in cpus.read_text(errors="replace")
    )


def use_onednn(module: nn.Module) -> None:
    """Sends the float32 products of a model's linear layers to oneDNN, where that is quicker."""
    if not onednn_is_quicker():
        return
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = types.MethodType(_forward, part)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """`nn.Linear.forward`; anything but plain float32 on the CPU goes its usual way."""
    weight, bias = layer.weight, layer.bias
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if not plain or torch.is_autocast_enabled("cpu") or type(weight.data) is not Tensor:
        return nn.functional.linear(x, weight, bias)
    y = OneDnnLinear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class OneDnnLinear(torch.autograd.Function):
    """X Wᵀ for x (n, i) and W (o, i), float32; (n, o)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Keeps both for the gradient."""
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """DX = g W and dW = gᵀ x."""
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            onednn_linear(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            onednn_linear(grad.t(), x.t()) if ctx.needs_input_grad[1] else None,
        )


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """X Wᵀ by oneDNN, without a gradient."""
    # The operator that torch.compile itself emits for a linear layer; transposed views are fine.
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
