"""Frozen linear layers in 4 bits: the base model of QLoRA (`lora.quantise: nf4`).

A product unpacks the whole weight and then multiplies as usual. bitsandbytes has kernels that
unpack while multiplying, but the kernel depends on the number of rows and each rounds differently,
so log-probabilities in generation and in training would come from different functions. Here 4 bits
only serve to save memory.

Source: Dettmers et al. 2023, arXiv 2305.14314 (the data type NF4, in blocks of 64 with a float32
scale). The scales are not quantised again, which would save 0.37 of 4.5 bits a weight.
"""

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.config.sections.model import LoRAConfig
from engine.errors import UserInputError, first_line
from engine.progress import BeginPart, no_progress
from engine.train.distributed.stored_tensor import held_values
from engine.train.models.adapters.lora import base_layers

BLOCK = 64
"""Number of weights that share a scale."""
TYPE = "nf4"
PIECE = 1 << 22
"""Number of weights that are packed at once, a multiple of BLOCK: bitsandbytes needs some 20 bytes
for each while it packs."""


def quantise(lm: PreTrainedModel, config: LoRAConfig, begin: BeginPart = no_progress) -> None:
    """Packs the weights of a model's linear layers, except the output layer and adapters.

    Weights are packed on the host, so that the result is the same on every device. Those that are
    still in their files are read one at a time; others on the meta device stay there.

    Args:
        lm: the model, with adapters or without; changed in place.
        config: without `quantise` nothing is done.
        begin: called when packing begins, which takes minutes for billions of weights on few cores.

    Raises:
        UserInputError: bitsandbytes is not installed, or cannot be used here.
    """
    if config.quantise == "none":
        return
    try:
        with torch.device("cpu"):  # another rank builds models on the meta device
            importlib.import_module("bitsandbytes")  # an extra; registers its operators
    except Exception as error:  # its library may be missing, or fail to load
        raise UserInputError(
            f"lora.quantise: bitsandbytes cannot be used here: {first_line(error)} "
            "(pip install 'rlhf-tui[qlora]')"
        ) from error
    layers = base_layers(lm)
    report = begin("pack weights")
    for done, (name, layer) in enumerate(layers.items(), 1):
        if type(layer) in (nn.Linear, Conv1D):  # a subclass may compute something else
            lm.set_submodule(name, QuantisedLinear(layer))
        report(done, len(layers))


def dequantise(lm: nn.Module) -> None:
    """Replaces packed layers by ordinary float32 layers with the unpacked weights."""
    for name, part in list(lm.named_modules()):
        if isinstance(part, QuantisedLinear):
            lm.set_submodule(name, part.unpacked())


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weight, (outputs, inputs), is packed in 4 bits.

    It computes in the weight's original dtype.
    """

    packed: Tensor
    """Two weights per byte, (⌈outputs · inputs / 2⌉, 1) uint8."""
    scales: Tensor
    """Largest absolute value in each block, float32."""
    bias: nn.Parameter | None

    def __init__(self, layer: Any) -> None:
        """Packs the weight of a linear layer (`nn.Linear`, or `Conv1D` of GPT-2)."""
        super().__init__()
        self._transposed = isinstance(layer, Conv1D)
        weight = held_values(layer.weight).detach()
        weight = weight.t() if self._transposed else weight
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        if weight.is_meta:
            count = weight.numel()
            packed = weight.new_empty((math.ceil(count / 2), 1), dtype=torch.uint8)
            scales = weight.new_empty(math.ceil(count / BLOCK), dtype=torch.float32)
        else:
            parts = [
                torch.ops.bitsandbytes.quantize_4bit(part, BLOCK, TYPE, torch.uint8)
                for part in weight.cpu().reshape(-1).split(PIECE)
            ]
            packed, scales = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result for (..., inputs), in its own dtype."""
        x = x.to(self.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _FrozenProduct.apply(x, self)
            return result
        return nn.functional.linear(x, self.weight(), self.bias)

    def weight(self) -> Tensor:
        """The weight that the layer computes with, (outputs, inputs); a new tensor."""
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, self.scales, BLOCK, TYPE, (self.out_features, self.in_features), self.dtype
        )
        return weight

    def unpacked(self) -> nn.Module:
        """A layer of the original class with that weight, in float32."""
        weight = self.weight().float()
        bias = None if self.bias is None else nn.Parameter(self.bias.float(), requires_grad=False)
        layer: Any
        if self._transposed:
            weight = weight.t().contiguous()
            layer = Conv1D(self.out_features, self.in_features)
        else:
            layer = nn.Linear(self.in_features, self.out_features, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = bias
        return layer

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {TYPE}"


def packed_weight_count(modules: Iterable[nn.Module]) -> int:
    """Counts the weights in packed layers among these modules, which are not parameters."""
    packed = (m for m in modules if isinstance(m, QuantisedLinear))
    return sum(layer.out_features * layer.in_features for layer in packed)


class _FrozenProduct(torch.autograd.Function):
    """The product with a packed weight, which is unpacked again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        """Keeps no tensor: the weight has no gradient."""
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight(), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of x, (..., inputs)."""
        return grad @ ctx.layer.weight(), None
