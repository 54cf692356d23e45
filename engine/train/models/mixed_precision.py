"""What autocast leaves out: the hidden states of a bfloat16 model, and the weights of experts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm


def keep_hidden_states_float32(module: nn.Module) -> None:
    """Makes the embeddings return float32, so that hidden states between products are float32.

    Autocast only casts the inputs of matrix products. The policy's embeddings and norms have
    float32 weights, so its hidden states are also float32. A reference with only bfloat16 weights
    would add and normalise bfloat16 hidden states, and differ from a policy with the same weights
    by 0.01 to 0.02 nats per token. This function makes both compute the same function, bit for bit
    if the model's files have bfloat16 weights.

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


class ExpertCasts:
    """Casts the float32 weights of experts to autocast's dtype.

    transformers stores the experts of a layer as one tensor and computes their products with
    operators that autocast does not know, in the dtype of the weights. Trained weights are float32,
    so their products would be too.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[nn.Module, str], Tensor] | None = None

    def apply_to(self, model: nn.Module) -> None:
        """Makes a model's experts compute with cast weights under autocast; call it once.

        Weights in the compute dtype, such as those that FSDP gathers, are used as they are.
        """
        replaced: dict[Any, Callable[..., Any]] = {}
        for part in model.modules():
            if is_experts(part):
                # One function for all layers, so that they share a compilation.
                bound: Any = part.forward
                forward = bound.__func__
                replaced.setdefault(forward, self._with_casts(forward))
                part.forward = MethodType(replaced[forward], part)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context manager in which a weight is cast once, if no gradients are computed.

        A pass with gradients makes its own casts, because the gradients flow through them. No
        weight may change inside the outermost context.
        """
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _with_casts(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_with_casts(experts: nn.Module, *args: Any, **keywords: Any) -> Any:
            names = _names_to_cast(experts)
            if not names:
                return forward(experts, *args, **keywords)
            try:
                for name in names:  # an attribute precedes the parameter of the same name
                    vars(experts)[name] = self._cast(experts, name)
                return forward(experts, *args, **keywords)
            finally:
                for name in names:
                    vars(experts).pop(name, None)

        return forward_with_casts

    def _cast(self, experts: nn.Module, name: str) -> Tensor:
        weight: Tensor = getattr(experts, name)
        dtype = torch.get_autocast_dtype(weight.device.type)
        if self._kept is None or torch.is_grad_enabled():
            return weight.to(dtype)
        if (experts, name) not in self._kept:
            self._kept[experts, name] = weight.to(dtype)
        return self._kept[experts, name]


def _names_to_cast(experts: nn.Module) -> list[str]:
    return [
        name
        for name, weight in experts.named_parameters(recurse=False)
        if weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type)
    ]


def is_experts(module: nn.Module) -> bool:
    """Whether it holds a layer's experts, as a class with `use_experts_implementation` does."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")
