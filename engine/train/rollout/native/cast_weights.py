"""Casts weights to the dtype of the matrix products once, for as long as they do not change.

Linear layers with the same input are fused: they share one weight tensor and compute one product.
For few rows, such as the tokens of a decoding step, launching a kernel takes longer than its work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from engine.train.models.mixed_precision import is_experts

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linear layers with the same input in transformers' models."""


@contextmanager
def cast_weights(blocks: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Context manager in which float32 linear layers and experts have weights in autocast's dtype.

    Does nothing outside autocast. The copies take as much memory as autocast's own would.

    Args:
        blocks: a model's decoder layers.
        device: the model's.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    originals: list[tuple[nn.Module, str, Tensor]] = []
    fused: list[nn.Module] = []
    modules = [module for block in blocks for module in block.modules()]

    def replace(module: nn.Module, name: str, weight: Tensor) -> None:
        originals.append((module, name, getattr(module, name)))
        setattr(module, name, nn.Parameter(weight, requires_grad=False))

    try:
        for layers in (group for module in modules for group in _with_same_input(module)):
            product = FusedLinear(layers, dtype)
            fused += layers
            for index, layer in enumerate(layers):
                replace(layer, "weight", product.weights[index])
                vars(layer)["forward"] = product.forward_of(index)
        for module in modules:
            if isinstance(module, nn.Linear) or is_experts(module):
                for name, weight in list(module.named_parameters(recurse=False)):
                    if weight.dtype == torch.float32:
                        replace(module, name, weight.detach().to(dtype))
        yield
    finally:
        for module in fused:
            vars(module).pop("forward", None)
        for module, name, original in originals:
            setattr(module, name, original)


def _with_same_input(module: nn.Module) -> Iterator[list[nn.Linear]]:
    """Yields the groups of a module's direct children whose products can be fused."""
    for names in SAME_INPUT:
        children = [getattr(module, name, None) for name in names]
        layers = [x for x in children if type(x) is nn.Linear and "forward" not in vars(x)]
        same = {(x.weight.dtype, x.bias is None) for x in layers}
        if len(layers) == len(names) and same in (
            {(torch.float32, True)},
            {(torch.float32, False)},
        ):
            yield layers


class FusedLinear:
    """Computes linear layers with the same input as one product.

    The layer that is called first computes the outputs of all. Each other layer takes its own
    output if it is called with the same tensor.
    """

    def __init__(self, layers: list[nn.Linear], dtype: torch.dtype) -> None:
        """Copies the weights and biases, to `dtype`."""
        self._weight = torch.cat([x.weight.detach().to(dtype) for x in layers])
        biases = [x.bias.detach().to(dtype) for x in layers if x.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._sizes = [x.out_features for x in layers]
        self.weights = self._weight.split(self._sizes)
        """Weights of each layer; views of one tensor."""
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def forward_of(self, index: int) -> Callable[[Tensor], Tensor]:
        """Returns the `forward` of one of the layers."""
        last = index == len(self._sizes) - 1

        def forward(x: Tensor) -> Tensor:
            if self._input is not x:
                outputs = linear(x, self._weight, self._bias)
                self._input, self._outputs = x, outputs.split(self._sizes, dim=-1)
            output = self._outputs[index]
            if last:  # keep no activations
                self._input, self._outputs = None, ()
            return output

        return forward
