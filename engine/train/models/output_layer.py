"""The output layer of a language model, and how the model transforms its result.

The logits of a whole micro-batch are often the largest tensor of a step. A caller that only needs
one number per token can read the hidden states instead and compute logits for some tokens at a
time. To do so it must know what follows the layer: nothing, a factor (Cohere, Granite), or a soft
cap (Gemma 2).
"""

import logging
import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

log = logging.getLogger("engine")

PROBES = (1.0, -1.0, 0.0, 0.25, -3.0, 8.0, 40.0, -200.0, 1e30)
"""Output-layer results for which the model's logits are probed."""
AGREEMENT = 1e-5
"""Largest relative difference between a model's logits and :meth:`AfterLayer.apply_`."""


@dataclass(frozen=True)
class AfterLayer:
    """Logits as a function of the output layer's result x: a·x, or c·tanh(a·x/c) with a cap c."""

    factor: float = 1.0
    cap: float | None = None

    def apply_(self, x: Tensor) -> Tensor:
        """Replaces x by the logits."""
        if self.factor != 1.0:
            x.mul_(self.factor)
        return x if self.cap is None else x.div_(self.cap).tanh_().mul_(self.cap)

    def scale_gradient_(self, gradient: Tensor, logits: Tensor) -> None:
        """Multiplies the logits' gradient in place by the derivative with respect to x."""
        if self.cap is not None:
            gradient.mul_(1 - (logits.float() / self.cap).square_())
        if self.factor != 1.0:
            gradient.mul_(self.factor)


class OutputLayer:
    """A model's output layer. Not a module, so that only the model registers the layer."""

    def __init__(self, lm: PreTrainedModel, compute: torch.dtype) -> None:
        """Determines what follows the layer; reads no weights.

        Args:
            lm: the language model, on any device.
            compute: dtype of the matrix products.
        """
        self.layer: Any = lm.get_output_embeddings()
        self.compute = compute
        self.after = find_after_layer(lm) if isinstance(self.layer, nn.Linear) else None
        """None if it is not one of the functions of :class:`AfterLayer`."""

    def use_float32(self) -> None:
        """Makes the layer compute in float32 even within autocast (`model.float32_logits`).

        Call it once the model is placed. Weights stored in a narrower dtype are converted at each
        call.
        """
        self.layer.forward = types.MethodType(_float32_linear, self.layer)
        self.compute = torch.float32

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token."""
        return int(self.layer.weight.shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states, (n, H) → (n, V), as the model computes them itself.

        Raises ValueError if :attr:`after` is None.
        """
        if self.after is None:
            raise ValueError("what follows the output layer is unknown")
        return self.after.apply_(self.layer.forward(hidden))  # its hooks have already run

    @contextmanager
    def reading(
        self, read: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> Iterator[list[tuple[Tensor, ...]]]:
        """Context manager in which a forward pass of the model computes no logits.

        Args:
            read: called with the layer's input, (n, T, H), while the layer's weight is available.

        Yields:
            A list that holds `read`'s result after the forward pass.
        """
        results: list[tuple[Tensor, ...]] = []
        compute = self.layer.forward

        def forward(hidden: Tensor) -> Tensor:
            with replaced_forward(self.layer, compute):  # `read` may call the layer
                results.append(read(hidden))
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        with replaced_forward(self.layer, forward):
            yield results


def _float32_linear(layer: nn.Linear, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return linear(hidden.float(), layer.weight.float(), bias)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context manager that replaces a module's `forward`. Its hooks still run."""
    before = vars(module).get("forward")  # set by `use_cpu_layers`, for example
    module.forward = forward  # of this module only
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _TrunkOutput:
    """Imitates a trunk's output: hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else ()

    def __getattr__(self, _name: str) -> None:
        return None


@torch.no_grad()
def find_after_layer(lm: PreTrainedModel) -> AfterLayer | None:
    """Determines by probing how a model transforms the result of its output layer.

    Runs the model's own `forward` between a trunk and an output layer that compute nothing. If the
    function is found, logits can be computed in chunks; otherwise they are computed all at once.
    """
    trunk, layer = lm.base_model, lm.get_output_embeddings()
    # A rank other than 0 builds models inside a context that puts new tensors on the meta device.
    tokens = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    hidden = torch.zeros(1, 1, layer.in_features, device="cpu")
    given = torch.tensor(PROBES, device="cpu").view(1, 1, -1)
    try:
        with (
            replaced_forward(trunk, lambda *_args, **_named: _TrunkOutput(hidden)),
            replaced_forward(layer, lambda _hidden: given.clone()),
        ):
            found = lm(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        found = found.detach().cpu().double().flatten()
    except Exception as error:  # unknown architectures may raise anything
        log.info("%s: logits are made at once: %s", type(lm).__name__, error)
        return None
    first, last = float(found[0]), float(found[-1])
    after = AfterLayer(factor=first)
    if 0 < last < PROBES[-1] * 1e-10:  # bounded
        slope = last * math.atanh(min(first / last, 0.999))
        # Rounded, as configurations give few digits and the slope only has float32 precision.
        after = AfterLayer(factor=float(f"{slope:.5g}"), cap=last)
    expected = after.apply_(given.double()).flatten()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=AGREEMENT):
        log.info("%s: logits are made at once: unknown after its output layer", type(lm).__name__)
        return None
    return after
