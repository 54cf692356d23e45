"""Compiles decoder layers for decoding, using `torch.compile`.

A layer's small operations are about forty kernels of a few microseconds each; with CUDA graphs they
take most of the time per token. A compiled layer has about fifteen kernels. All layers of a model
share one compilation, since they differ only in their weights ("regional compilation").
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache

from engine.train.distributed.sharding import blocks
from engine.train.models.adapters.quantised_linear import packed_weight_count
from engine.train.models.language_model import AnyModel, cache_name
from engine.train.rollout.native.cast_weights import cast_weights
from engine.train.rollout.native.cuda_graph import can_capture
from engine.train.rollout.native.decoding_attention import DECODING_ATTENTION
from engine.train.rollout.native.kv_cache import PreallocatedLayer
from engine.train.rollout.sampling import Distribution, distribution

log = logging.getLogger("engine")

WORTHWHILE = 50_000_000
"""Number of layer weights from which `auto` compiles, which takes about 20 s once per process."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float16: 0.02}
"""Largest norm of a compiled layer's error, relative to the norm of its output."""


class CompiledLayers:
    """Compiles the decoder layers of the generating models where that pays off.

    The first token is also computed without compilation. If the results differ, or a layer cannot
    be compiled, this is logged once and the layers are used uncompiled from then on.
    """

    def __init__(self, when: str = "auto", *, backend: str = "inductor") -> None:
        """Compiles nothing yet.

        Args:
            when: a value of `rollout.compile`.
            backend: the backend of `torch.compile`.
        """
        self._when = when
        self._backend = backend
        self._function: Callable[..., Any] | None = None
        self._distribution: Callable[..., Any] | None = None
        self._checked = self._distribution_checked = False
        self.usable = True
        """False once a layer failed to compile or gave wrong results."""
        self._shapes: dict[AnyModel, set[Hashable]] = {}

    def shapes_of(self, model: AnyModel) -> set[Hashable]:
        """Keys of the shapes that a model's layers have been compiled for; callers add theirs.

        A new shape may compile again, which a CUDA graph's capture does not allow. So may the same
        shape for another model, whose weights have another dtype, or no adapters.
        """
        return self._shapes.setdefault(model, set())

    @contextmanager
    def used_by(self, model: AnyModel, device: torch.device) -> Iterator[set[Hashable] | None]:
        """Context manager in which the model's layers decode compiled, if they should.

        Enter it inside the model's autocast. Weights are cast to the dtype of the products first,
        since a compiled layer would cast them for each token.

        Yields:
            :meth:`shapes_of` the model; None if its layers are not compiled.
        """
        layers = blocks(model.lm)
        if not self._wanted(model, layers, device):
            yield None
            return
        if self._function is None:  # importing the compiler takes seconds
            log.info("compiling layers for decoding (rollout.compile): the first tokens wait")
            self._function = torch.compile(_one_token, dynamic=True, backend=self._backend)
            self._distribution = torch.compile(distribution, dynamic=True, backend=self._backend)
        config = model.lm.config
        attention = config._attn_implementation
        with cast_weights(layers, device):
            for index, layer in enumerate(layers):
                last = index == len(layers) - 1
                layer.forward = self._forward(self._function, index, layer, last=last)
            config._attn_implementation = DECODING_ATTENTION
            try:
                yield self.shapes_of(model)
            finally:
                config._attn_implementation = attention
                for layer in layers:
                    del layer.forward

    def _wanted(self, model: AnyModel, layers: list[nn.Module], device: torch.device) -> bool:
        if self._when == "never" or not self.usable or not layers:
            return False
        # Positions and masks are passed in rather than made by transformers, which requires sdpa.
        if getattr(model.lm.config, "_attn_implementation", None) != "sdpa":
            return False
        # FSDP2's hooks, or a `forward` replaced by another library, would be bypassed.
        if any(isinstance(x, FSDPModule) or "forward" in vars(x) for x in layers):
            return False
        if self._when == "always":
            return True
        weights = sum(p.numel() for layer in layers for p in layer.parameters())
        weights += packed_weight_count(m for layer in layers for m in layer.modules())
        return can_capture(model, device) and weights >= WORTHWHILE

    def _forward(
        self, compiled: Callable[..., Any], index: int, layer: nn.Module, *, last: bool
    ) -> Callable[..., Any]:
        """Returns a layer's `forward`, compiled for one token per row of a fixed-shape cache."""
        eager = layer.forward

        def forward(hidden: Tensor, *args: Any, **keywords: Any) -> Any:
            name = cache_name(keywords)
            cache = keywords.get(name)
            past = cache.layers[index] if isinstance(cache, DynamicCache) else None
            fixed = past.fixed() if isinstance(past, PreallocatedLayer) else None
            if hidden.shape[1] != 1 or fixed is None or args or not self.usable:
                return eager(hidden, *args, **keywords)
            try:
                output = compiled(layer, hidden, keywords | {name: fixed})
                if self._checked:
                    return output
                expected = eager(hidden, **keywords)
                self._check(output, expected)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # torch.compile may raise any type
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise
                self._give_up(str(error))
                return eager(hidden, **keywords)
            self._checked = last
            return output

        return forward

    def distribution(self, logits: Tensor, temperature: float) -> Distribution:
        """:func:`~engine.train.rollout.sampling.distribution`, compiled if the layers are.

        In eager mode each operation reads or writes the whole vocabulary; together they take a
        tenth of the time per token. Never raises compiler errors.
        """
        if self._distribution is None or not self.usable:
            return distribution(logits, temperature)
        torch._dynamo.mark_static(logits, 1)  # the vocabulary
        try:
            found: Distribution = self._distribution(logits, temperature)
            if not self._distribution_checked:
                self._check(found.probs, distribution(logits, temperature).probs)
            self._distribution_checked = True
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as of a layer
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise
            self._give_up(str(error))
            return distribution(logits, temperature)
        return found

    def _check(self, output: Any, expected: Any) -> None:
        one, other = (x[0] if isinstance(x, tuple) else x for x in (output, expected))
        dtype = torch.get_autocast_dtype(one.device.type)
        if not torch.is_autocast_enabled(one.device.type):
            dtype = one.dtype
        error = float((one - other).float().norm() / other.float().norm())
        if not error <= TOLERANCE.get(dtype, 0.02):
            raise ValueError(f"their output is off by {error:.2g}")

    def _give_up(self, reason: str) -> None:
        self.usable = False
        # The compiler's first line names the part that failed, the second gives the reason.
        short = " ".join(reason.split("\n\n", 1)[0].split())
        log.warning("decoding without compiled layers: %s", short[:300])


def _one_token(layer: nn.Module, hidden: Tensor, keywords: dict[str, Any]) -> Any:
    """The function to compile. Calls the class's `forward`: the instance's leads back here."""
    return type(layer).forward(layer, hidden, **keywords)
