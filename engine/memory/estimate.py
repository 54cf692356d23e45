"""What a rank will hold in memory: the arithmetic, from shapes alone.

Structs in, structs out: no torch, no weights, nothing is read. ``benchmarks/memory.py`` holds it
against measured peaks, a test its formula against what autograd keeps.

A run's memory is that of its fullest *phase*, so each phase is a sum of named parts, in bytes.
n rows of L tokens, T of them the answer's; H hidden, A attention (heads × head size), I the MLP's
width, V the vocabulary.
"""

from engine.config.schema import RunConfig
from engine.memory.model import Estimate, Layout, Models, Shape

WIDTH = {"float32": 4, "bfloat16": 2}
MASTER = 4
"""Bytes of a master weight, of its gradient and of each of AdamW's two moments: float32."""
BACKWARD_LOGITS = 1
"""float32 tensors (n, T, V) alive at once in training: the gradient is written over the logits."""
FORWARD_LOGITS = 1
"""… and in a pass without gradients: what is exponentiated goes in small pieces."""
SAMPLING = 6
"""float32 tensors (n, V) alive at once in :func:`engine.train.generate.sample`."""
LAZY = 80_000_000
"""Code and buffers of torch's that a CPU rank touches in its first step, beyond what imports do."""
LAZY_BFLOAT16 = 80_000_000
"""… and what oneDNN compiles and keeps for bfloat16 products."""
CUDA_CONTEXT = 600_000_000
"""What the driver, the kernels and cuBLAS take of a GPU; torch does not count it."""


def estimate(config: RunConfig, models: Models, layout: Layout) -> Estimate:
    """What one rank holds, phase by phase."""
    return Estimate(layout=layout, phases=_Estimator(config, models, layout).phases())


class _Estimator:
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
        valued = config.ppo.traits.value_function
        self._separate = valued and config.model.value == "separate"
        head = policy.hidden + 1 if valued else 0
        self._trunk = policy.parameters - policy.head if self._separate else 0
        adapters = self._adapters * (2 if self._separate else 1)
        self._trained = (adapters or policy.parameters + self._trunk) + head
        # What lies under adapters is not trained, and held in the dtype it is computed in.
        self._frozen = policy.parameters + self._trunk if self._adapters else 0

    def _adapter_parameters(self) -> int:
        if self._layout.lora_rank is None:
            return 0
        wanted = self._config.lora.targets or list(self._policy.linear)
        return self._layout.lora_rank * sum(self._policy.linear.get(t, 0) for t in wanted)

    def phases(self) -> dict[str, dict[str, int]]:
        """Phase → part → bytes."""
        held = self._at_rest()
        # On a CPU a frozen model that is whole rests in a file. In memory while it is read are its
        # embedding and a block or two; all of it is counted, for files that have no room.
        resting = ("reference", "reward") if self._models.device == "cpu" else ()
        resting = () if self._sharded else resting
        at_rest = {k: v for k, v in held.items() if k not in resting}
        return {
            **({"load": self._loading()} if self._models.device == "cpu" else {}),
            "generate": at_rest | self._generating(),
            "score": at_rest | {"reward": held["reward"]} | self._scoring(),
            "reference": at_rest | {"reference": held["reference"]} | self._reading_tokens(),
            "optimise": at_rest | self._optimising(),
        }

    # -- what stays ---------------------------------------------------------------------------

    def _process(self) -> dict[str, int]:
        if self._models.device == "cuda":
            return {"CUDA context": CUDA_CONTEXT}
        narrow = "bfloat16" in (self._config.model.dtype, self._config.reward.dtype)
        return {"process": self._models.process + LAZY + (LAZY_BFLOAT16 if narrow else 0)}

    def _at_rest(self) -> dict[str, int]:
        """Weights and moments; those that are sharded are divided by the number of ranks."""
        trunk = self._trunk * (self._compute if self._adapters else MASTER)
        held = MASTER * self._trained + self._compute * self._frozen
        shards = self._shards
        reference = 0 if self._borrowed else self._models.reference.parameters
        rewards = sum(r.parameters for r in self._models.rewards)
        return self._process() | {
            "policy": (held - trunk) // shards,
            "value": trunk // shards,
            "optimiser": 2 * MASTER * self._trained // shards,
            "reference": self._compute * reference // shards,
            "reward": self._reward_width * rewards // shards,
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
        # Rows that stay when others end pass through a copy; grouped heads are spread out to all.
        copied = 2 * rows * self._length * self._compute * policy.key_value
        spread = policy.attention if policy.key_value < policy.attention else 0
        copied += 2 * rows * self._length * self._compute * spread
        sampling = SAMPLING + (self._models.device == "cuda")  # its cumulative sums are float64
        return {
            "KV cache": cache + copied,
            "activations": passing_forward(policy, rows, self._models.prompt_tokens, self._compute),
            "logits": sampling * MASTER * rows * policy.vocabulary,
            "gathered": self._whole(policy, self._compute),
            "casts": self._casts(),
        }

    def _scoring(self) -> dict[str, int]:
        found = {"activations": 0, "gathered": 0}
        config = self._config.reward
        rows, length = min(config.batch_size, self._rows), min(config.max_tokens, self._length)
        for shape in self._models.rewards:
            passing = passing_forward(shape, rows, length, self._reward_width)
            found["activations"] = max(found["activations"], passing)
            found["gathered"] = max(found["gathered"], self._whole(shape, self._reward_width))
        return found

    def _reading_tokens(self) -> dict[str, int]:
        """A forward pass over finished answers: the reference's, or the policy's own again."""
        readers, length = (self._policy, self._models.reference), self._length - 1
        return {
            "activations": max(
                passing_forward(r, self._reading, length, self._compute) for r in readers
            ),
            "logits": FORWARD_LOGITS * self._logits(self._reading),
            "gathered": self._whole(self._models.reference, self._compute),
            "casts": self._casts(),
        }

    def _optimising(self) -> dict[str, int]:
        policy, rows, length = self._policy, self._micro, self._length - 1
        kept = kept_for_backward(policy, rows, length, self._compute, again=self._checkpointing)
        # Both trunks' until the one backward; a rank alone does them one after the other.
        kept *= 2 if self._separate and self._layout.ranks > 1 else 1
        gathered = 0
        if self._sharded:
            # The layer at hand and the next, and all that is in no layer; whole gradients of both.
            outside = max(0, policy.parameters - policy.layers * policy.largest_layer)
            gathered = self._compute * (2 * policy.largest_layer + outside)
            # … and, where they are computed narrower, their copies in float32 to be summed.
            gradient = MASTER if self._compute == MASTER else self._compute + MASTER
            gathered += gradient * (policy.largest_layer + outside)
        return {
            "gradients": MASTER * self._trained // self._shards,
            "activations": kept + passing_forward(policy, rows, length, self._compute),
            "logits": BACKWARD_LOGITS * self._logits(rows),
            "gathered": gathered,
            "casts": self._casts(),
        }

    @property
    def _checkpointing(self) -> bool:
        return self._config.parallel.activation_checkpointing

    def _logits(self, rows: int) -> int:
        return MASTER * rows * self._answer * self._policy.vocabulary

    def _whole(self, shape: Shape, width: int) -> int:
        """What fsdp gathers on each rank for a phase: every weight, once."""
        return width * shape.parameters if self._sharded else 0

    def _casts(self) -> int:
        """Autocast's bfloat16 copies of float32 weights; fsdp gathers in bfloat16 instead.

        Made anew in each forward pass and held to its end, in training to that of the backward.
        """
        if self._compute == MASTER or self._sharded:
            return 0
        used = self._policy.parameters - self._policy.head  # an embedding that is no head stays
        return 0 if self._frozen else self._compute * (used + self._trunk)


def kept_for_backward(shape: Shape, rows: int, length: int, width: int, *, again: bool) -> int:
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


def passing_forward(shape: Shape, rows: int, length: int, width: int) -> int:
    """What a forward pass without gradients has at once: the stream and one layer's insides."""
    h, a, i = shape.hidden, shape.attention, shape.intermediate
    return rows * length * (2 * MASTER * h + width * max(h + 3 * i, 2 * h + 6 * a)) + (
        rows * length**2 * (1 + width)
    )
