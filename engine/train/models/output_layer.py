"""The output layer of a language model, and what the model does to its result.

Logits of a whole micro-batch are often the largest tensor of a step. A caller that needs a number
per token reads the hidden states instead and computes the logits of some tokens at a time. For that
it has to know what follows the layer: nothing, a factor (Cohere, Granite), or a soft cap (Gemma 2).
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
"""Results of the output layer at which a model is asked for its logits."""
AGREEMENT = 1e-5
"""Relative difference by which a model's logits may differ from :meth:`AfterLayer.apply_`."""


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
    """A model's output layer. Not a module: the layer stays a part of its model alone."""

    def __init__(self, lm: PreTrainedModel, compute: torch.dtype) -> None:
        """Finds out what follows the layer; reads no weight.

        Args:
            lm: the language model, on any device.
            compute: dtype of the matrix products.
        """
        self.layer: Any = lm.get_output_embeddings()
        self.compute = compute
        self.after = find_after_layer(lm) if isinstance(self.layer, nn.Linear) else None
        """None if it is something else than the functions of :class:`AfterLayer`."""

    def use_float32(self) -> None:
        """Has the layer compute in float32 within autocast, too (`model.float32_logits`).

        Call it when the model is placed. Weights that are held in a narrower dtype are converted at
        each call.
        """
        self.layer.forward = types.MethodType(_float32_linear, self.layer)
        self.compute = torch.float32

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token."""
        return int(self.layer.weight.shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states, (n, H) → (n, V), as the model computes them itself."""
        if self.after is None:
            raise ValueError("what follows the output layer is unknown")
        return self.after.apply_(self.layer.forward(hidden))  # its hooks have seen all of them

    @contextmanager
    def reading(
        self, read: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> Iterator[list[tuple[Tensor, ...]]]:
        """Context in which a forward pass of the model makes no logits.

        Args:
            read: called with the layer's input, (n, T, H), while the layer's weight is at hand.

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
    """Context in which a module computes something else. Its hooks run as always."""
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
    """What a trunk returns: hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else ()

    def __getattr__(self, _name: str) -> None:
        return None


@torch.no_grad()
def find_after_layer(lm: PreTrainedModel) -> AfterLayer | None:
    """Finds what a model does to the result of its output layer, by trying numbers.

    Runs the model's own `forward` between a trunk and an output layer that compute nothing. The
    logits are then made in pieces; for a function that is not found they are made at once.
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
    except Exception as error:  # whatever an architecture that we do not know raises here
        log.info("%s: logits are made at once: %s", type(lm).__name__, error)
        return None
    first, last = float(found[0]), float(found[-1])
    after = AfterLayer(factor=first)
    if 0 < last < PROBES[-1] * 1e-10:  # bounded
        slope = last * math.atanh(min(first / last, 0.999))
        # A number of six digits or so in a configuration, known here to float32's precision.
        after = AfterLayer(factor=float(f"{slope:.5g}"), cap=last)
    expected = after.apply_(given.double()).flatten()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=AGREEMENT):
        log.info("%s: logits are made at once: unknown after its output layer", type(lm).__name__)
        return None
    return after
