"""DoRA (Liu et al. 2024, arXiv 2402.09353): an adapter that trains lengths and directions apart.

Row i of an adapted weight is mᵢ · (Wᵢ + ΔWᵢ) / ‖Wᵢ + ΔWᵢ‖, where ΔW is the adapter's change and m
the trained lengths. As in the paper (section 4.3), no gradient flows through the norms.

peft computes ΔW and the norms in every forward pass, by a product with an identity matrix. This
costs as much as a pass over hundreds of tokens, for each token of a rollout. Here the norms are a
buffer, which :func:`update_norms` fills whenever weights may have changed, and all passes use it.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.train.distributed.sharding import full_tensor

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class RowLengths(nn.Module):
    """The lengths of a layer's rows; takes the place of peft's `DoraLinearLayer`."""

    norms: Tensor

    def __init__(self, rows: int) -> None:
        """Allocates them on the default device; :func:`initialise` sets them."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows))
        # Follows from the weights, so that neither checkpoints nor fingerprints need it.
        self.register_buffer("norms", torch.empty(rows), persistent=False)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Callable[[Tensor], Tensor],  # noqa: N803 - peft's names
        lora_B: Callable[[Tensor], Tensor],  # noqa: N803
        scaling: float,
        base_layer: Any,
        base_result: Tensor,
        **_: Any,
    ) -> Tensor:
        """Computes what is to be added to the result of the layer under the adapter.

        The lengths scale one tensor, the sum, so that autograd keeps one for their gradient.
        """
        plain = base_result if base_layer.bias is None else base_result - base_layer.bias
        adapted: Tensor = plain + scaling * lora_B(lora_A(x))
        return self.weight / self.norms * adapted - plain


def add_lengths(layer: "LoraLayer") -> None:
    """Replaces the lengths that peft has added to a layer, which are not set afterwards."""
    rows = layer.lora_B["default"].get_parameter("weight").shape[0]
    layer.lora_magnitude_vector["default"] = RowLengths(rows)


def row_lengths(layer: "LoraLayer") -> RowLengths | None:
    """The lengths of an adapted layer; None for plain LoRA, and for a model that peft loads."""
    lengths = dict(layer.lora_magnitude_vector.items()).get("default")
    return lengths if isinstance(lengths, RowLengths) else None


@torch.no_grad()
def initialise(layers: "Iterable[LoraLayer]") -> None:
    """Sets the lengths to the norms, so that adapters that change no direction change nothing.

    Call it when the weights have their final values: packed ones differ from those before.
    """
    for layer in layers:
        lengths = row_lengths(layer)
        if lengths is not None:
            lengths.weight.copy_(row_norms(layer))


@torch.no_grad()
def update_norms(layers: "Iterable[LoraLayer]") -> None:
    """Computes the norms that forward passes divide by; call it after weights have changed.

    Takes one layer's weight in float32 at a time. In place, because CUDA graphs keep addresses.
    """
    for layer in layers:
        lengths = row_lengths(layer)
        if lengths is not None:
            lengths.norms.copy_(row_norms(layer))


def row_norms(layer: "LoraLayer") -> Tensor:
    """The norms of :func:`adapted_rows`, (outputs,) float32."""
    return torch.linalg.vector_norm(adapted_rows(layer), dim=1)


def adapted_rows(layer: "LoraLayer") -> Tensor:
    """W + scale · B·A without the lengths, (outputs, inputs) float32."""
    base: Any = layer.get_base_layer()
    if callable(base.weight):  # packed
        weight: Tensor = base.weight()
    else:
        weight = base.weight.detach()
        weight = weight.t() if getattr(layer, "fan_in_fan_out", False) else weight
    # A weight may be mapped from a file or in another order, in which sums would round otherwise.
    return low_rank_change(layer).add_(weight)


def low_rank_change(layer: "LoraLayer") -> Tensor:
    """The change of the weight, scale · B·A, (outputs, inputs) float32.

    All ranks of a sharded model must call it, in the same order.
    """
    first, second = (
        full_tensor(part["default"].get_parameter("weight").detach()).float()
        for part in (layer.lora_A, layer.lora_B)
    )
    return (second @ first) * layer.scaling["default"]
