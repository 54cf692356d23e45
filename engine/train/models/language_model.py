"""The policy with its value function, the reference, and a fingerprint of their weights."""

import hashlib
import inspect
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from engine.train.distributed.sharding import full_tensor
from engine.train.models.activations.offloaded import OffloadedActivations
from engine.train.models.adapters import dora, lora
from engine.train.models.adapters.quantised_linear import packed_weight_count
from engine.train.models.mixed_precision import ExpertCasts
from engine.train.models.output_layer import OutputLayer
from engine.train.models.router_loss import load_balancing_loss

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class HiddenReader(Protocol):
    """Computes something from hidden states without materialising all logits at once."""

    def wants(self, logits: int) -> bool:
        """Whether to read the hidden states instead of returning this many logits."""

    def __call__(self, output: OutputLayer, hidden: Tensor) -> tuple[Tensor, ...]:
        """Computes from the output layer's input, (…, H), inside the forward pass."""


class PassOutputs(NamedTuple):
    """What a forward pass computes at k positions of n rows; None for what is not computed."""

    logits: Any
    """(n, k, V) in the model's dtype, or the tensors that a :class:`HiddenReader` returns."""
    values: Tensor | None
    """(n, k) float32."""
    router_loss: Tensor | None = None
    """The load-balancing loss of a mixture of experts; a scalar with gradient."""


def cache_name(parameters: Container[str]) -> str:
    """Returns the name of the key-value cache argument among a `forward`'s parameters.

    transformers renamed it in 5.24 and announces that 5.40 will reject the old name. Models with
    custom code may use either.
    """
    return "cache" if "cache" in parameters else "past_key_values"


class LanguageModel(nn.Module):
    """A causal language model with an optional value function.

    The policy and the value head are one module, called through its `forward`: FSDP and DDP modules
    only work when the root is called.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        value: str | None = None,
        compute: torch.dtype = torch.float32,
    ) -> None:
        """Wraps a language model.

        Args:
            lm: the language model, with its output layer.
            value: None for no value function; `shared` for a value head on the policy's trunk;
                `separate` for a second trunk, which the caller assigns to `value_trunk`.
            compute: dtype of the matrix products; the weights keep their own dtype.
        """
        super().__init__()
        self.lm = lm
        self._compute = compute
        self._expert_casts = ExpertCasts()
        self.output = OutputLayer(lm, compute)
        self.value_trunk: nn.Module | None = None
        self.value_head: nn.Linear | None = None
        head = lm.get_output_embeddings()
        if value is not None:
            # Zero, so that the first advantages depend only on the rewards.
            self.value_head = nn.Linear(head.in_features, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        head.register_forward_pre_hook(self._select_hidden)
        self._read_at: Tensor | None = None
        """Positions of the next forward pass of the language model, (N,) int64; None: all that
        reach the output layer."""
        self._shared_value = value == "shared"
        self._hidden: Tensor | None = None
        """The output layer's input, for a shared value head."""
        self._adapted = lora.adapted_layers(lm)
        self.offloaded: OffloadedActivations | None = None
        """Set if what is kept for the backward pass is to be moved to the host."""
        self._in_pass = False
        """Whether a context of :meth:`autocast` is open."""
        parameters = inspect.signature(lm.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._cache_name = cache_name(parameters)

    def _select_hidden(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        if self._read_at is not None:
            hidden = hidden_at(hidden, self._read_at)
        # torch multiplies each row of a slice by itself, and on a CPU copies the weight for each.
        hidden = hidden.contiguous()
        if self._shared_value:
            self._hidden = hidden
        return hidden, *others

    def forward(
        self, tokens: Tensor, *args: Any, adapters: bool = True, **kwargs: Any
    ) -> PassOutputs:
        """Calls :meth:`run` under autocast to the compute dtype.

        `adapters=False` disables the LoRA adapters for this call. It is an argument instead of
        model state so that it also works through a DDP or FSDP wrapper. Not thread-safe.
        """
        with ExitStack() as stack:
            if not adapters:
                stack.enter_context(lora.disabled(self._adapted))
            stack.enter_context(self.autocast(tokens.device.type))
            if self.offloaded is not None:
                stack.enter_context(self.offloaded.kept())
            return self.run(tokens, *args, **kwargs)

    def cast_experts(self) -> None:
        """Makes experts with float32 weights compute in the compute dtype.

        Call it once, when `value_trunk` is assigned.
        """
        if self._compute is not torch.float32:
            self._expert_casts.apply_to(self)

    @cached_property
    def _all_adapted(self) -> "list[LoraLayer]":
        """The layers with adapters, also those of a value trunk, which is assigned later."""
        return lora.adapted_layers(self)

    @contextmanager
    def autocast(self, device: str) -> Iterator[None]:
        """The autocast context of forward passes; in float32 it casts nothing.

        Autocast keeps its copies of trained weights until the outermost context ends, and so do
        experts. Adapters of DoRA compute their norms when it begins. Enter this context around
        forward passes between which no weight changes, such as a rollout's, so that this is done
        once instead of once per token.
        """
        half = self._compute is not torch.float32
        outermost, self._in_pass = not self._in_pass, True
        try:
            if outermost:
                dora.update_norms(self._all_adapted)
            with torch.autocast(device, self._compute, enabled=half), self._expert_casts.kept():
                yield
        finally:
            self._in_pass = not outermost

    def run(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        keep: int | Tensor,
        *,
        cache: Any = None,
        want: str = "both",
        detach_trunk: bool = False,
        positions: Tensor | None = None,
        read: HiddenReader | None = None,
        balance: Tensor | None = None,
    ) -> PassOutputs:
        """Computes logits and values at k positions of each row.

        Args:
            tokens: (n, L) int64.
            attention_mask: (n, L), or (n, past + L) with a cache; 0 for left padding. With
                `positions` it may also be (n, 1, L, places of the cache) bool.
            keep: the last k positions of each row; or N positions of any rows, different from each
                other, as indices into n·L, (N,) int64. The results then have one row, of N columns.
            cache: a transformers cache, which this call extends.
            want: `both`, `logits` or `values`.
            detach_trunk: do not propagate the value's gradient to a shared trunk.
            positions: (n, L) int64; default: computed from the mask.
            read: reads the hidden states, if it wants to and the function from hidden states to
                logits is known.
            balance: the tokens that count in the routers' load-balancing loss, (n, L) bool; None to
                compute none.

        Returns:
            The outputs. The values are None without a value function, with `want="logits"`, and
            with a cache if the value function has a separate trunk.
        """
        if positions is None:
            # From the mask, so that left padding does not shift positions (trl#6819: 34 nats of
            # error).
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs: dict[str, Any] = {"attention_mask": attention_mask}
        if self._takes_positions:
            inputs["position_ids"] = positions
        logits, router_loss = None, None
        if want != "values" or self.value_trunk is None:
            logits, router_loss = self._logits(tokens, inputs, keep, cache, read, balance)
        values = self._values(tokens, inputs, keep, cache, want, detach_trunk=detach_trunk)
        return PassOutputs(logits, values, router_loss)

    def _values(
        self,
        tokens: Tensor,
        inputs: dict[str, Any],
        keep: int | Tensor,
        cache: Any,
        want: str,
        *,
        detach_trunk: bool,
    ) -> Tensor | None:
        """The values of :meth:`run`; reads what a shared trunk has just computed."""
        hidden: Any = self._hidden  # of a shared trunk
        self._hidden = None  # it keeps all activations alive
        # A separate value trunk has no cache: it reads complete responses.
        separate_and_cached = self.value_trunk is not None and cache is not None
        if self.value_head is None or want == "logits" or separate_and_cached:
            return None
        if self.value_trunk is not None:  # always trained together with the value head
            hidden = self.value_trunk(input_ids=tokens, use_cache=False, **inputs).last_hidden_state
            hidden = hidden[:, -keep:] if isinstance(keep, int) else hidden_at(hidden, keep)
        elif detach_trunk:
            hidden = hidden.detach()
        # Only one product per token, so float32 is cheap.
        with torch.autocast(tokens.device.type, enabled=False):
            # A copy, not a view: FSDP2 registers hooks on the outputs, and an in-place operation on
            # a view would lose them.
            values: Tensor = self.value_head(hidden.float()).squeeze(-1).clone()
        return values

    def _logits(
        self,
        tokens: Tensor,
        inputs: dict[str, Any],
        keep: int | Tensor,
        cache: Any,
        read: HiddenReader | None,
        balance: Tensor | None,
    ) -> tuple[Tensor | tuple[Tensor, ...], Tensor | None]:
        """Runs the language model; stores the hidden states for a shared value head."""
        inputs = inputs | {
            "input_ids": tokens, self._cache_name: cache, "use_cache": cache is not None,
            "logits_to_keep": keep if isinstance(keep, int) else 0,  # 0: all
        }  # fmt: skip
        if balance is not None:
            inputs["output_router_logits"] = True
        self._read_at = None if isinstance(keep, int) else keep
        count = len(tokens) * keep if isinstance(keep, int) else len(keep)
        try:
            if read is None or not self._is_read(read, count):
                found = self.lm(**inputs)
                logits = found.logits
            else:
                with self.output.reading(partial(read, self.output)) as results:
                    found = self.lm(**inputs)
                logits = results[0]
            return logits, None if balance is None else load_balancing_loss(self.lm, found, balance)
        except BaseException:
            self._hidden = None
            raise
        finally:
            self._read_at = None

    def _is_read(self, read: HiddenReader, tokens: int) -> bool:
        known = self.output.after is not None
        return known and read.wants(tokens * self.output.vocabulary)


def hidden_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Selects N positions, indices into n·L, of hidden states (n, L, H): (1, N, H)."""
    return hidden.flatten(0, 1).index_select(0, positions).unsqueeze(0)


class AdapterFreePolicy:
    """A LoRA policy without its adapters, used as the reference; shares the policy's weights.

    Has the interface of :class:`LanguageModel` but computes logits only. It calls the policy's own
    `forward` and therefore works for a sharded policy.
    """

    def __init__(self, policy: LanguageModel) -> None:
        self.lm = policy.lm
        self._model = policy

    def __call__(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        keep: int | Tensor,
        *,
        cache: Any = None,
        positions: Tensor | None = None,
        read: HiddenReader | None = None,
        **_: Any,
    ) -> PassOutputs:
        """Like :meth:`LanguageModel.run` with `want="logits"`; the values are None."""
        outputs: PassOutputs = self._model(
            tokens, attention_mask, keep, cache=cache, positions=positions, want="logits",
            adapters=False, read=read,
        )  # fmt: skip
        return outputs

    def autocast(self, device: str) -> AbstractContextManager[None]:
        """As :meth:`LanguageModel.autocast`."""
        return self._model.autocast(device)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The frozen weights under the adapters."""
        return (p for p in self.lm.parameters() if not p.requires_grad)

    def modules(self) -> Iterator[nn.Module]:
        """The policy's modules, so that `materialised` gathers the policy."""
        return self._model.modules()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the base weights, with the names they have in a model without adapters."""
        return {f"lm.{name}": tensor for name, tensor in lora.base_tensors(self.lm).items()}


AnyModel = LanguageModel | AdapterFreePolicy
"""The policy, or either kind of reference."""


def parameter_count(model: AnyModel) -> int:
    """Returns the number of weights of a model, including those in packed layers."""
    lm_only = isinstance(model, AdapterFreePolicy)
    modules = model.lm.modules() if lm_only else model.modules()
    return sum(p.numel() for p in model.parameters()) + packed_weight_count(modules)


def fingerprint(module: nn.Module | AdapterFreePolicy) -> str:
    """Hashes all weights, to detect that a frozen model has changed.

    Sums the bits of each tensor first, because hashing them would take seconds for billions of
    weights. This detects accidents, not attacks. For a sharded model all ranks must call it; each
    sums its own shards, so that no weights are sent.
    """
    tensors = sorted(module.state_dict().items())
    sums, sharded, group = [], [], None
    for _, tensor in tensors:
        apart = isinstance(tensor, DTensor) and _sums_apart(tensor)
        sharded.append(apart)
        if apart:
            group = tensor.device_mesh.get_group()
        sums.append(_bit_sums(tensor if apart else full_tensor(tensor)))
    all_sums = torch.stack([s.to(sums[0].device) for s in sums])
    if group is not None:
        chosen = torch.tensor(sharded, device=all_sums.device)
        totals = torch.where(chosen[:, None], all_sums, 0)
        dist.all_reduce(totals, group=group)
        all_sums = torch.where(chosen[:, None], totals, all_sums)
    digest = hashlib.sha256()
    for (name, tensor), (total, weighted) in zip(tensors, all_sums.tolist(), strict=True):
        digest.update(f"{name}:{tuple(tensor.shape)}:{total}:{weighted};".encode())
    return digest.hexdigest()


def _sums_apart(tensor: DTensor) -> bool:
    """Whether each rank can sum its own shard: shards consist of rows of whole 32-bit words."""
    row = tensor.numel() // max(1, tensor.shape[0]) * tensor.element_size()
    return tensor.placements == (Shard(0),) and row % 4 == 0


def _bit_sums(tensor: Tensor) -> Tensor:
    """Computes two sums over the bits of a tensor or of this rank's part; (2,) int64.

    The first is over all 32-bit words (or bytes, if there are no whole words). The second is over
    about a thousand of them, weighted by position. Both wrap around.
    """
    local, start = tensor.detach(), 0
    words = -(-tensor.numel() * tensor.element_size() // 4)
    if isinstance(tensor, DTensor):
        mesh, local = tensor.device_mesh, tensor.to_local().detach()
        row = tensor.numel() // max(1, tensor.shape[0]) * tensor.element_size() // 4
        rows = -(-tensor.shape[0] // mesh.size())
        start = min(mesh.get_local_rank() * rows, tensor.shape[0]) * row
    bits = local.contiguous().view(-1).view(torch.uint8)
    if len(bits) % 4 == 0:
        bits = bits.view(torch.int32)
    else:
        words = len(bits)
    step = max(1, words // 1024)
    few = bits[-start % step :: step].to(torch.int64)
    first = -(-start // step)
    weights = torch.arange(first, first + len(few), device=bits.device)
    weighted = (few * 31 * (-(-words // step) - weights)).sum()
    if bits.device.type == "cpu":  # torch would copy all bits to int64
        total = torch.from_numpy(np.asarray(bits.numpy().sum(dtype=np.int64)))
    else:
        total = bits.sum(dtype=torch.int64)
    return torch.stack([total, weighted])
