"""What a rank will hold in memory: the arithmetic, from shapes alone.

Structs in, structs out; no torch, no weights, nothing read. :mod:`engine.train.shapes` finds the
shapes, :mod:`engine.capacity` what the machine has, ``benchmarks/memory.py`` holds the result
against measured peaks.

A run's memory is that of its fullest *phase*, so each phase is a sum of named parts. Bytes
throughout. n rows of L tokens; H hidden, A attention (heads × head size), I the MLP's width, V the
vocabulary, all of one token.
"""

from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from engine.config import RunConfig

WIDTH = {"float32": 4, "bfloat16": 2}
MASTER = 4
"""Bytes of a master weight, of its gradient and of each of AdamW's two moments: float32."""
WHAT_IF_RANK = 16
"""Of LoRA, where the configuration names none and the planner shows what it would save."""
BACKWARD_LOGITS = 4
"""float32 tensors (n, T, V) alive at once in the backward of logsumexp: logits and 3 more."""
FORWARD_LOGITS = 2
"""The logits, and what logsumexp exponentiates."""
SAMPLING = 6
"""float32 tensors (n, V) alive at once in :func:`engine.train.rollout.sample`."""
LAZY = 80_000_000
"""Code and buffers of torch's that a CPU rank touches in its first step, beyond what imports do."""
LAZY_BFLOAT16 = 80_000_000
"""… and what oneDNN compiles and keeps for bfloat16 products."""
CUDA_CONTEXT = 600_000_000
"""What the driver, the kernels and cuBLAS take of a GPU; torch does not count it."""
MARGIN = 1.1
"""A run fits where this multiple of its estimate does."""


class Shape(Struct, frozen=True, kw_only=True):
    """A model's sizes, from its configuration."""

    parameters: int
    """All of them; tied ones once."""
    head: int = 0
    """Of these, the language model head's own; 0 where it is tied to the embedding."""
    largest_layer: int
    """Parameters of one layer."""
    layers: int
    hidden: int
    attention: int
    """Heads × head size."""
    key_value: int
    """Key-value heads × head size."""
    intermediate: int
    """Of the MLP; of a mixture, what one token goes through."""
    vocabulary: int
    linear: dict[str, int] = {}
    """Inputs + outputs of the linear modules in all layers, by the modules' names: LoRA's size."""


class Models(Struct, frozen=True, kw_only=True):
    """What a run consists of, as far as memory goes."""

    policy: Shape
    reference: Shape
    rewards: list[Shape] = []
    prompt_tokens: int
    """Of the longest prompt, or the most there may be."""
    exact_prompts: bool = False
    """Whether the prompts were looked at."""
    process: int = 0
    """What a rank holds with nothing but its modules imported; host memory."""
    device: Literal["cpu", "cuda"] = "cpu"


class Layout(Struct, frozen=True, kw_only=True):
    """How the work is shared out."""

    strategy: Literal["one", "ddp", "fsdp"] = "one"
    ranks: int = 1
    lora_rank: int | None = None
    """None: every weight is trained."""

    @property
    def title(self) -> str:
        """`1 rank`, `fsdp ×4`, `ddp ×2 LoRA`."""
        name = "1 rank" if self.strategy == "one" else f"{self.strategy} ×{self.ranks}"
        return name if self.lora_rank is None else f"{name} LoRA"


class Estimate(Struct, frozen=True, kw_only=True):
    """One rank's memory in one layout."""

    layout: Layout
    phases: dict[str, dict[str, int]]
    """Phase → part → bytes."""

    @property
    def totals(self) -> dict[str, int]:
        """Phase → bytes."""
        return {name: sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def parts(self) -> dict[str, int]:
        """Part → the most it takes in any phase."""
        names = dict.fromkeys(n for parts in self.phases.values() for n in parts)
        return {n: max(p.get(n, 0) for p in self.phases.values()) for n in names}

    @property
    def peak(self) -> int:
        """Of the fullest phase."""
        return max(self.totals.values())

    @property
    def fullest(self) -> str:
        """The phase of the peak."""
        totals = self.totals
        return max(totals, key=lambda name: totals[name])

    @property
    def metric(self) -> int:
        """What `perf/peak_memory_gb` will show: on a GPU, what torch allocates."""
        return self.peak - self.parts.get("CUDA context", 0)


def layouts(config: RunConfig, ranks: int) -> list[Layout]:
    """The strategies side by side: one rank, ddp, fsdp; each whole and by LoRA."""
    lora = lora_rank(config) or WHAT_IF_RANK
    plain = [Layout(), *(Layout(strategy=s, ranks=ranks) for s in ("ddp", "fsdp"))]
    return [*plain, *(replace(layout, lora_rank=lora) for layout in plain)]


def configured(config: RunConfig, ranks: int) -> Layout:
    """What the configuration asks for. `auto` is ddp until a model is too large for it."""
    strategy: Any = "fsdp" if config.parallel.strategy == "fsdp" else "ddp"
    return Layout(
        strategy=strategy if ranks > 1 else "one", ranks=ranks, lora_rank=lora_rank(config)
    )


def lora_rank(config: RunConfig) -> int | None:
    """The rank of `lora`, if the run uses it."""
    return getattr(getattr(config, "lora", None), "rank", None)


def estimate(config: RunConfig, models: Models, layout: Layout) -> Estimate:
    """What one rank holds, phase by phase."""
    return Estimate(layout=layout, phases=_Reckoning(config, models, layout).phases())


class _Reckoning:
    """The sizes that several phases share, worked out once."""

    def __init__(self, config: RunConfig, models: Models, layout: Layout) -> None:
        self._config, self._models, self._layout = config, models, layout
        self._policy = policy = models.policy
        self._compute = WIDTH[config.model.dtype]
        self._reward_width = WIDTH[config.reward.dtype]
        self._sharded = layout.strategy == "fsdp"
        self._shards = layout.ranks if self._sharded else 1
        ranks, batch = layout.ranks, config.rollout.batch_size
        self._rows = -(-batch // ranks)
        minibatch = -(-batch // config.ppo.minibatches // ranks)
        self._micro = max(1, min(config.ppo.micro_batch_size, minibatch))
        self._reading = max(1, min(config.ppo.micro_batch_size, self._rows))
        self._answer = config.rollout.max_new_tokens
        self._length = models.prompt_tokens + self._answer
        # LoRA's reference is the policy with its adapters off.
        self._borrowed = layout.lora_rank is not None and config.model.reference is None
        self._adapters = self._adapter_parameters()
        self._separate = config.ppo.advantage == "gae" and config.model.value == "separate"
        value = policy.hidden + 1 if config.ppo.advantage == "gae" else 0
        self._value = value + (policy.parameters - policy.head if self._separate else 0)
        self._trained = (self._adapters or policy.parameters) + self._value

    def _adapter_parameters(self) -> int:
        if self._layout.lora_rank is None:
            return 0
        targets = getattr(getattr(self._config, "lora", None), "targets", None)
        wanted = targets if isinstance(targets, list) and targets else list(self._policy.linear)
        return self._layout.lora_rank * sum(self._policy.linear.get(t, 0) for t in wanted)

    def phases(self) -> dict[str, dict[str, int]]:
        """Phase → part → bytes."""
        at_rest = self._at_rest()
        return {
            **({"load": self._loading()} if self._models.device == "cpu" else {}),
            "generate": at_rest | self._generating(),
            "score": at_rest | self._scoring(),
            "reference": at_rest | self._reading_tokens(),
            "optimise": at_rest | self._optimising(),
        }

    # -- what stays ---------------------------------------------------------------------------

    def _process(self) -> dict[str, int]:
        if self._models.device == "cuda":
            return {"CUDA context": CUDA_CONTEXT}
        narrow = "bfloat16" in (self._config.model.dtype, self._config.reward.dtype)
        return {"process": self._models.process + LAZY + (LAZY_BFLOAT16 if narrow else 0)}

    def _at_rest(self) -> dict[str, int]:
        """Sharded weights, gradients and moments are divided by the number of ranks."""
        policy, shards = self._policy.parameters + self._adapters, self._shards
        reference = 0 if self._borrowed else self._models.reference.parameters
        rewards = sum(r.parameters for r in self._models.rewards)
        return self._process() | {
            "policy": MASTER * policy // shards,
            "value": MASTER * self._value // shards,
            "optimiser": 2 * MASTER * self._trained // shards,
            "reference": self._compute * reference // shards,
            "reward": self._reward_width * rewards // shards,
            # DDP sums gradients in buckets of its own.
            "buckets": MASTER * self._trained if self._layout.strategy == "ddp" else 0,
        }

    def _loading(self) -> dict[str, int]:
        """The reference comes last: its file's pages and the copy out of them, side by side."""
        last = self._policy if self._borrowed else self._models.reference
        held = {k: v for k, v in self._at_rest().items() if k not in ("optimiser", "reference")}
        return held | {"loading": (2 * MASTER) * last.parameters}

    # -- the phases of a step -----------------------------------------------------------------

    def _generating(self) -> dict[str, int]:
        policy, rows = self._policy, self._rows
        cache = rows * self._length * 2 * policy.layers * policy.key_value * self._compute
        # A longer cache is a new tensor beside the old one; grouped heads are spread out to all.
        copied = 2 * rows * self._length * self._compute * policy.key_value
        spread = policy.attention if policy.key_value < policy.attention else 0
        copied += 2 * rows * self._length * self._compute * spread
        return {
            "KV cache": cache + copied,
            "activations": _passing(policy, rows, self._models.prompt_tokens, self._compute),
            "logits": SAMPLING * MASTER * rows * policy.vocabulary,
            "gathered": self._whole(policy, self._compute) + self._casts(),
        }

    def _scoring(self) -> dict[str, int]:
        found = {"activations": 0, "gathered": 0}
        config = self._config.reward
        rows, length = min(config.batch_size, self._rows), min(config.max_tokens, self._length)
        for shape in self._models.rewards:
            passing = _passing(shape, rows, length, self._reward_width)
            found["activations"] = max(found["activations"], passing)
            found["gathered"] = max(found["gathered"], self._whole(shape, self._reward_width))
        return found

    def _reading_tokens(self) -> dict[str, int]:
        """A forward pass over finished answers: the reference's, or the policy's own again."""
        policy, length = self._policy, self._length - 1
        return {
            "activations": _passing(policy, self._reading, length, self._compute),
            "logits": FORWARD_LOGITS * self._logits(self._reading),
            "gathered": self._whole(self._models.reference, self._compute) + self._casts(),
        }

    def _optimising(self) -> dict[str, int]:
        policy, rows, length = self._policy, self._micro, self._length - 1
        kept = _kept(policy, rows, length, self._compute, again=self._checkpointing)
        kept *= 2 if self._separate else 1  # both trunks' until the one backward
        gathered = self._casts()
        if self._sharded:
            # The layer at hand and the next, and all that is in no layer; whole gradients of both.
            outside = max(0, policy.parameters - policy.layers * policy.largest_layer)
            gathered = self._compute * (2 * policy.largest_layer + outside)
            gathered += self._compute * (policy.largest_layer + outside)
        return {
            "gradients": MASTER * self._trained // self._shards,
            "activations": kept + _passing(policy, rows, length, self._compute),
            "logits": BACKWARD_LOGITS * self._logits(rows),
            "gathered": gathered,
        }

    @property
    def _checkpointing(self) -> bool:
        return bool(getattr(self._config.parallel, "activation_checkpointing", False))

    def _logits(self, rows: int) -> int:
        return MASTER * rows * self._answer * self._policy.vocabulary

    def _whole(self, shape: Shape, width: int) -> int:
        """What fsdp gathers on each rank for a phase: every weight, once."""
        return width * shape.parameters if self._sharded else 0

    def _casts(self) -> int:
        """Autocast's bfloat16 copies of float32 weights; fsdp gathers in bfloat16 instead."""
        if self._compute == MASTER or self._sharded:
            return 0
        return self._compute * (self._policy.parameters + (self._value if self._separate else 0))


def _kept(shape: Shape, rows: int, length: int, width: int, *, again: bool) -> int:
    """What autograd keeps of a forward pass for the backward.

    In float32 a layer keeps 6·H (each norm's input, its normed input and what it returns), 4·A
    (queries, spread keys and values, the output) and 4·I of a gated MLP (gate, its activation, up,
    their product). Under autocast the norms stay float32, and each product keeps a bfloat16 copy of
    its input. Each layer converts the mask, L×L a row. Held against autograd by a test.

    `again`: activation checkpointing keeps a layer's input and computes the rest again.
    """
    h, a, i = shape.hidden, shape.attention, shape.intermediate
    layer = 4 * (6 * h + 4 * a + 4 * i) if width == MASTER else 26 * h + 8 * a + 8 * i
    tokens = rows * length
    one = tokens * layer + rows * length**2 * width
    outside = 3 * MASTER * h * tokens
    if again:
        return shape.layers * tokens * MASTER * h + one + outside
    return shape.layers * one + outside


def _passing(shape: Shape, rows: int, length: int, width: int) -> int:
    """What a forward pass without gradients has at once: the stream and one layer's insides."""
    h, a, i = shape.hidden, shape.attention, shape.intermediate
    return rows * length * (2 * MASTER * h + width * max(h + 3 * i, 2 * h + 6 * a)) + (
        rows * length**2 * (1 + width)
    )
