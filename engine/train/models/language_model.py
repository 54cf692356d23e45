"""The policy with its value head, and how a frozen model is told from another."""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.train.distributed.sharding import full_tensor
from engine.train.models import lora
from engine.train.models.onednn_linear import use_onednn


class LanguageModel(nn.Module):
    """A causal language model, with a value function where one is asked for.

    Policy and value head are one module entered by its own forward: sharded and wrapped modules
    work only when entered at the root.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        value: str | None = None,
        compute: torch.dtype = torch.float32,
    ) -> None:
        """Wraps a model.

        Args:
            lm: the language model, with its head.
            value: None, `shared` or `separate` (a trunk of its own, which the caller sets).
            compute: what matrix products are computed in; weights keep their own dtype.
        """
        super().__init__()
        self.lm = lm
        use_onednn(lm)
        self._compute = compute
        self.value_trunk: nn.Module | None = None
        self.value_head: nn.Linear | None = None
        head = lm.get_output_embeddings()
        if value is not None:
            # Zero-initialised: the first advantages come from the rewards alone.
            self.value_head = nn.Linear(head.in_features, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        if value == "shared":
            # The head's input: the trunk's last hidden state, exactly at the positions kept.
            head.register_forward_pre_hook(self._keep_hidden)
        self._hidden: Tensor | None = None
        self._adapted = lora.adapted_layers(lm)
        self._takes_positions = "position_ids" in inspect.signature(lm.forward).parameters

    def _keep_hidden(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]

    def forward(
        self, tokens: Tensor, *args: Any, adapters: bool = True, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`run` in the chosen compute dtype, with or without the adapters there may be.

        That is an argument, not a state, so that it reaches a wrapped or sharded model as well, and
        ends with the call. Not for two threads at once.
        """
        with ExitStack() as stack:
            if not adapters:
                stack.enter_context(lora.switched_off(self._adapted))
            stack.enter_context(self.autocast(tokens.device.type))
            return self.run(tokens, *args, **kwargs)

    def autocast(self, device: str) -> torch.autocast:
        """The context that forward passes compute in; does nothing in float32.

        Autocast keeps its copies of trained weights until the outermost context ends. Enter this
        one around many forward passes between which no weight changes, such as a rollout's, so
        that weights are cast once and not once per token.
        """
        return torch.autocast(device, self._compute, enabled=self._compute is not torch.float32)

    def run(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        keep: int,
        *,
        cache: Any = None,
        want: str = "both",
        detach_trunk: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and values at the last `keep` positions.

        Args:
            tokens: (n, L) int64.
            attention_mask: (n, L), or (n, past + L) with a cache; left padding is 0.
            keep: positions wanted, from the end.
            cache: a transformers cache, filled along the way.
            want: `both`, `logits` or `values`.
            detach_trunk: hold the value's gradient back from the trunk.

        Returns:
            logits (n, keep, V) in the model's dtype; values (n, keep) float32, None without a
            value function, and with a cache where it has a trunk of its own.
        """
        # Positions from the mask: left padding must not shift them (trl#6819: 34 nats off).
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs: dict[str, Any] = {"attention_mask": attention_mask}
        if self._takes_positions:
            inputs["position_ids"] = positions
        logits, values = None, None
        separate = self.value_trunk is not None
        if want != "values" or not separate:
            logits = self.lm(
                input_ids=tokens,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=keep,
                **inputs,
            ).logits
        # A trunk of the value's own keeps no cache: it reads whole answers, once they are written.
        if self.value_head is None or want == "logits" or (separate and cache is not None):
            self._hidden = None
            return logits, None
        if separate:
            trunk = self.value_trunk(input_ids=tokens, use_cache=False, **inputs)  # type: ignore[misc]
            hidden = trunk.last_hidden_state[:, -keep:]
        else:
            hidden, self._hidden = self._hidden, None
        # A trunk of the value's own may learn whenever the value does.
        hidden = hidden.detach() if detach_trunk and not separate else hidden
        # One product a token: kept exact.
        with torch.autocast(tokens.device.type, enabled=False):
            # Not a view: FSDP2 hooks on what leaves the module, and an operation in place on a view
            # would lose the hook.
            values = self.value_head(hidden.float()).squeeze(-1).clone()
        return logits, values


class AdapterFreePolicy:
    """The model under a policy's adapters, used like a :class:`LanguageModel`; no copy of it.

    It gives logits alone, and enters the policy's own forward, so it works where that is wrapped or
    sharded.
    """

    def __init__(self, policy: LanguageModel) -> None:
        self.lm = policy.lm
        self._model = policy

    def __call__(
        self, tokens: Tensor, attention_mask: Tensor, keep: int, *, cache: Any = None, **_: Any
    ) -> tuple[Any, None]:
        """As :meth:`LanguageModel.run`, with `want="logits"`."""
        logits, _values = self._model(
            tokens, attention_mask, keep, cache=cache, want="logits", adapters=False
        )
        return logits, None

    def autocast(self, device: str) -> torch.autocast:
        """As :meth:`LanguageModel.autocast`."""
        return self._model.autocast(device)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights without the adapters."""
        return (p for p in self.lm.parameters() if not p.requires_grad)

    def modules(self) -> Iterator[nn.Module]:
        """The policy's, which are gathered for this one as for itself."""
        return self._model.modules()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights without the adapters, named as in a model that never had any."""
        return {f"lm.{name}": tensor for name, tensor in lora.base_tensors(self.lm).items()}


AnyModel = LanguageModel | AdapterFreePolicy
"""What generates and scores: the policy, or either kind of reference."""


def fingerprint(module: nn.Module | AdapterFreePolicy) -> str:
    """A hash of all weights, to tell whether a frozen model is the one it was.

    Adds up each tensor's bits rather than feeding them to a cryptographic hash: seconds for
    billions of weights, and it guards against accidents, not attackers. Of a sharded model every
    rank must ask.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        bits = full_tensor(tensor).detach().contiguous().view(-1).view(torch.uint8)
        if len(bits) % 4 == 0:
            bits = bits.view(torch.int32)
        total = int(bits.sum(dtype=torch.int64))
        weighted = int((bits[:: max(1, len(bits) // 1024)].to(torch.int64) * 31).cumsum(0).sum())
        digest.update(f"{name}:{tuple(tensor.shape)}:{total}:{weighted};".encode())
    return digest.hexdigest()
