"""Estimates the memory of a rank from the shapes of its models, without torch and without weights.

``benchmarks/memory.py`` compares the estimate with measured peaks; a test compares the activation
formula with what autograd keeps.

A run needs as much memory as its largest *phase*. Each phase is a sum of named parts, in bytes.
Notation: n rows of L tokens, of which T belong to the response; H hidden size, A attention size
(heads × head size), I width of the MLP, V vocabulary.
"""

from engine.config.schema import RunConfig
from engine.memory.model import (
    LOGITS_AT_ONCE,
    LOGITS_PIECE,
    Estimate,
    Layout,
    Models,
    Shape,
)

WIDTH = {"float32": 4, "bfloat16": 2}
MASTER = 4
"""Bytes per master weight, and per element of its gradient (float32)."""
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.1}
"""Bytes per weight of AdamW's two moments; for 8 bits, including scales of blocks of about 100."""
QUANTISED = {"none": 0.0, "nf4": 0.5625}
"""Bytes per 4-bit weight, including scales of blocks of 64; 0 for weights in `model.dtype`."""
SAMPLING = 6
"""float32 tensors (n, V) alive at once in :func:`engine.train.rollout.sampling.sample`."""
LAZY = 120_000_000
"""Bytes of torch's code and buffers that a CPU rank first uses in its first step, with what the
phases leave in the heap."""
SMALL_BLOCK = 1 << 23
"""A CPU's allocator keeps smaller freed blocks (`engine.launch.environment.MALLOC_SETTINGS`)."""
FRAGMENTED = 0.4
"""Bytes of unusable gaps between such blocks, for each byte of activations. Measured for the
starter: 0.36 to 0.55."""
RETURNED = 1.3
"""With hidden states of this many :data:`SMALL_BLOCK`, nearly all activations are returned."""
LAZY_BFLOAT16 = 80_000_000
"""Bytes that oneDNN's compiled kernels for bfloat16 take in addition."""
CUDA_CONTEXT = 600_000_000
"""Bytes of the driver, the kernels and cuBLAS on a GPU; torch does not count them."""


def estimate(config: RunConfig, models: Models, layout: Layout) -> Estimate:
    """Estimates one rank's memory in each phase.

    Args:
        config: the run's configuration.
        models: shapes of the models, and the length of the prompts.
        layout: how the work is divided among ranks.
    """
    return Estimate(layout=layout, phases=_Estimator(config, models, layout).phases())


class _Estimator:
    """Computes the sizes that several phases share, then the phases."""

    def __init__(self, config: RunConfig, models: Models, layout: Layout) -> None:
        self._config, self._models, self._layout = config, models, layout
        self._policy = policy = models.policy
        self._compute = WIDTH[config.model.dtype]
        self._reward_width = WIDTH[config.reward.dtype]
        self._sharded = layout.strategy == "fsdp"
        self._shards = layout.ranks if self._sharded else 1
        ranks, batch = layout.ranks, config.rollout.batch_size
        self._rows = -(-batch // ranks)
        self._minibatch = max(1, -(-batch // config.ppo.minibatches // ranks))
        self._micro = min(config.ppo.micro_batch_size, self._minibatch)
        self._read_rows = max(1, min(config.ppo.micro_batch_size, self._rows))
        self._response = config.rollout.max_new_tokens
        self._context = models.prompt_tokens + config.reply_tokens
        self._length = self._context + self._response
        # With LoRA, the policy with its adapters disabled serves as the reference.
        self._shared_reference = layout.lora_rank is not None and config.model.reference_is_policy
        targets = config.lora.targets or list(policy.linear)
        scaled = config.lora.dora and layout.lora_rank is not None
        self._scaled_outputs = sum(policy.outputs.get(t, 0) for t in targets) if scaled else 0
        inputs_and_outputs = sum(policy.linear.get(t, 0) for t in targets)
        self._adapters = (layout.lora_rank or 0) * inputs_and_outputs + self._scaled_outputs
        has_value = config.trained_value is not None
        self._separate = has_value and config.model.value == "separate"
        head = policy.hidden + 1 if has_value else 0
        # A value function that starts from the reward model has its size.
        trunk = policy
        if config.ppo.value_init == "reward_model" and len(models.rewards) == 1:
            trunk = models.rewards[0]
        self._trunk = trunk.parameters - trunk.head if self._separate else 0
        adapters = self._adapters * (2 if self._separate else 1)
        self._trained = (adapters or policy.parameters + self._trunk) + head
        # The weights under adapters are frozen and kept in the compute dtype.
        self._frozen = policy.parameters + self._trunk if self._adapters else 0
        self._quantised = QUANTISED[config.lora.quantise] if self._adapters else 0.0

    def phases(self) -> dict[str, dict[str, int]]:
        """Phase → part → bytes."""
        static = self._static()
        # On a CPU a frozen model that is not sharded stays in a file between uses. While it is used
        # only its embedding and a few layers are in memory; all of it is counted, because the
        # estimate must also hold where the file does not fit.
        in_files = ("reference", "reward") if self._models.device == "cpu" else ()
        in_files = () if self._sharded else in_files
        always = {k: v for k, v in static.items() if k not in in_files}
        return {
            **({"load": self._loading()} if self._models.device == "cpu" else {}),
            "generate": always | self._generating(),
            "score": always | {"reward": static["reward"]} | self._scoring(),
            "reference": always | {"reference": static["reference"]} | self._computing_logprobs(),
            **({"fit": always | self._fitting()} if self._config.linear_value else {}),
            "optimise": always | self._optimising(),
        }

    # -- held in all phases -------------------------------------------------------------------

    def _process(self) -> dict[str, int]:
        if self._models.device == "cuda":
            return {"CUDA context": CUDA_CONTEXT}
        narrow = "bfloat16" in (self._config.model.dtype, self._config.reward.dtype)
        return {"process": self._models.process + LAZY + (LAZY_BFLOAT16 if narrow else 0)}

    def _static(self) -> dict[str, int]:
        """Process, weights and moments; sharded ones are divided by the number of ranks."""
        trunk = self._frozen_bytes(self._trunk) if self._adapters else MASTER * self._trunk
        weights = MASTER * self._trained
        if self._adapters:
            weights += trunk + self._frozen_bytes(self._policy.parameters)
        shards = self._shards
        reference = 0 if self._shared_reference else self._models.reference.parameters
        rewards = sum(r.parameters for r in self._models.rewards)
        ema = self._config.train.ema
        on_device = ema.decay is not None and (not ema.offload or self._models.device == "cpu")
        averaged = MASTER * (self._adapters or self._policy.parameters) if on_device else 0
        return self._process() | {
            "policy": (weights - trunk) // shards,
            "value": trunk // shards,
            "optimiser": int(MOMENTS[self._config.train.optimiser] * self._trained) // shards,
            **({"average": averaged // shards} if averaged else {}),
            "reference": self._compute * reference // shards,
            "reward": self._reward_width * rewards // shards,
        }

    def _frozen_bytes(self, parameters: int) -> int:
        """Bytes of the base weights of a model with the policy's shape, or of its trunk."""
        packed = self._policy.in_linear if parameters and self._quantised else 0
        return int(self._compute * (parameters - packed) + self._quantised * packed)

    def _loading(self) -> dict[str, int]:
        """The peak during loading: all models but the last, and what reading that takes.

        Weights go from their files to their place one tensor at a time; of a sharded model each
        rank reads its own shards. An unsharded reference is then copied to the file to which it is
        mapped. A model that transformers reads is mapped from its own file and copied.
        """
        last = self._policy if self._shared_reference else self._models.reference
        loaded = {
            k: v
            for k, v in self._static().items()
            if k not in ("optimiser", "average", "reference")
        }
        if self._sharded:
            largest = max(last.largest_layer, last.vocabulary * last.hidden)
            shards = 0 if self._shared_reference else self._compute * last.parameters
            return loaded | {"loading": shards // self._shards + MASTER * largest}
        if last.read_whole:
            return loaded | {"loading": 2 * MASTER * last.parameters}
        packed = MASTER * last.largest_layer if self._quantised else 0
        copied = 0 if self._shared_reference else 2 * self._compute * last.parameters
        return loaded | {"loading": copied + packed}

    # -- the phases of a step -----------------------------------------------------------------

    def _generating(self) -> dict[str, int]:
        policy, rows, at_once = self._policy, self._rows, self._config.rollout.at_once
        if self._config.rollout.uses_vllm:  # weights are sent, one tensor gathered at once
            return {"gathered": MASTER * policy.vocabulary * policy.hidden * self._sharded}
        length = self._length
        if self._config.reply_tokens:
            # In a turn, one response may have sampled nearly all of its tokens, and another none.
            length += self._response
        if at_once is not None and at_once < rows:
            # Room to fill slots again before positions are moved to the front of the cache.
            rows, length = at_once, length + max(self._response // 2, 16)
        cache = rows * length * 2 * policy.layers * policy.key_value * self._compute
        # Removing finished rows copies the cache; grouped heads are expanded to all heads.
        copied = 2 * rows * length * self._compute * policy.key_value
        expanded = policy.attention if policy.key_value < policy.attention else 0
        copied += 2 * rows * length * self._compute * expanded
        sampling = SAMPLING + (self._models.device == "cuda")  # cumulative sums are float64 there
        return {
            "KV cache": cache + copied,
            "activations": forward_activations(
                policy, rows, self._context, self._compute, masked=True
            ),
            "logits": sampling * MASTER * rows * policy.vocabulary,
            "gathered": self._gathered(policy, self._compute),
            "casts": self._casts(),
            "copies": self._copies(),
        }

    def _scoring(self) -> dict[str, int]:
        found = {"activations": 0, "gathered": 0}
        config = self._config.reward
        rows, length = min(config.batch_size, self._rows), min(config.max_tokens, self._length)
        for shape in self._models.rewards:
            masked = shape.needs_mask(length) or not shape.ignores_padding
            passing = forward_activations(shape, rows, length, self._reward_width, masked=masked)
            found["activations"] = max(found["activations"], passing)
            found["gathered"] = max(found["gathered"], self._gathered(shape, self._reward_width))
        return found | self._states()

    def _states(self) -> dict[str, int]:
        """The reward model's hidden states of the rank's responses, after two of its layers."""
        if not self._config.linear_value:
            return {}
        width = self._models.rewards[0].hidden
        return {"states": MASTER * self._rows * self._response * 2 * width}

    def _fitting(self) -> dict[str, int]:
        """Fitting a linear function of these states; float64."""
        features = 3 * self._models.rewards[0].hidden
        matrices = 3 * features**2 + 2 * features * self._response + 3 * self._response**2
        return self._states() | {"system": 8 * matrices}

    def _computing_logprobs(self) -> dict[str, int]:
        """A forward pass over finished responses, of the reference or of the policy."""
        models, length = (self._policy, self._models.reference), self._length - 1
        return {
            "activations": max(
                forward_activations(
                    m, self._read_rows, length, self._compute, masked=m.needs_mask(length)
                )
                for m in models
            ),
            "logits": self._logits(self._read_rows),
            "gathered": self._gathered(self._models.reference, self._compute),
            "casts": max(self._casts(), self._widened(self._models.reference)),
            **self._states(),
        }

    def _optimising(self) -> dict[str, int]:
        policy, rows, length = self._policy, self._micro, self._length - 1
        kept = kept_for_backward(
            policy, rows, length, self._compute, checkpointing=self._checkpointing
        )
        if self._config.parallel.activations == "offload" and self._models.device == "cuda":
            kept -= policy.layers * rows * length * MASTER * policy.hidden
        if self._adapters and self._compute != MASTER and policy.recomputes_products:
            # An adapter of the MLP's last layer keeps a copy of the product in its own dtype.
            copies = rows * length * self._compute * policy.intermediate
            kept += 0 if self._checkpointing else policy.layers * copies
        # With DoRA also the results of the adapted layers, for the gradient of the rows' lengths.
        scaled = rows * length * self._compute * self._scaled_outputs
        kept += scaled // policy.layers if self._checkpointing else scaled
        # Both trunks, until the common backward pass; a single rank runs one after the other.
        kept *= 2 if self._separate and self._layout.ranks > 1 else 1
        gathered = 0
        if self._sharded:
            # The current layer, the next one and the weights outside layers; their full gradients.
            outside = max(0, policy.parameters - policy.layers * policy.largest_layer)
            gathered = self._compute * (2 * policy.largest_layer + outside)
            # In a narrower compute dtype also their float32 copies for the reduction.
            gradient = MASTER if self._compute == MASTER else self._compute + MASTER
            gathered += gradient * (policy.largest_layer + outside)
        passing = forward_activations(
            policy, rows, length, self._compute, masked=policy.needs_mask(length)
        )
        return {
            "gradients": MASTER * self._trained // self._shards,
            "activations": kept + passing - self._replaced(kept),
            "heap": self._heap(kept + passing, MASTER * rows * length * policy.hidden),
            "logits": self._logits(rows) + self._head_gradient(rows),
            "gathered": gathered,
            "casts": self._casts(),
        }

    def _replaced(self, kept: int) -> int:
        """Bytes of activations in place of which gradients come.

        In a minibatch of one pass, a layer's activations are freed before the layer below has
        gradients, so that only the larger of both counts. The output layer's gradient comes first.
        On a GPU this has not been measured, so both count.
        """
        one_pass = self._layout.ranks == 1 and not self._separate and self._micro == self._minibatch
        if not one_pass or self._adapters or self._models.device == "cuda":
            return 0
        return min(kept, MASTER * max(0, self._trained - _output_layer(self._policy)))

    def _heap(self, activations: int, block: int) -> int:
        """Gaps between activations in a CPU's heap; `block` is the size of the hidden states.

        The share falls before all blocks are large, because layers also have wider tensors.
        """
        if self._models.device != "cpu":
            return 0
        share = (RETURNED - block / SMALL_BLOCK) * 0.75
        return int(min(FRAGMENTED, max(0.0, share)) * activations)

    @property
    def _checkpointing(self) -> bool:
        return self._config.parallel.activation_checkpointing

    def _logits(self, rows: int) -> int:
        """Logits in the dtype of the output layer, in training overwritten by their gradient.

        In bfloat16 a piece of them and its softmax are float32 as well.
        """
        device = self._models.device
        count = min(self._all_logits(rows), LOGITS_AT_ONCE[device])
        width = MASTER if self._config.model.float32_logits else self._compute
        pieces = 0 if width == MASTER else 2 * MASTER * min(count, LOGITS_PIECE[device])
        return width * count + pieces

    def _head_gradient(self, rows: int) -> int:
        """The output layer's gradient of a micro-batch, if it is summed over chunks."""
        if self._frozen or self._all_logits(rows) <= LOGITS_AT_ONCE[self._models.device]:
            return 0
        return MASTER * self._policy.hidden * self._policy.vocabulary

    def _all_logits(self, rows: int) -> int:
        return rows * self._response * self._policy.vocabulary

    def _gathered(self, shape: Shape, width: int) -> int:
        """Bytes that fsdp gathers on each rank for a phase: every weight, once."""
        return width * shape.parameters if self._sharded else 0

    def _casts(self) -> int:
        """Autocast's bfloat16 copies of float32 weights; fsdp gathers in bfloat16 instead.

        With `model.float32_logits` the output layer has none; where it is held or gathered in
        bfloat16 it has a float32 copy. Recreated on every forward pass; freed when it ends, or in
        training after its backward pass.
        """
        if self._compute == MASTER:
            return 0
        if self._sharded or self._frozen:
            return self._widened(self._policy)
        used = self._policy.parameters - self._policy.head  # an untied embedding is not cast
        if self._config.model.float32_logits:
            used -= _output_layer(self._policy)
        return self._compute * (used + self._trunk)

    def _copies(self) -> int:
        """Trained weights in another order while responses are generated.

        Only some processors need them; counted on every CPU.
        """
        on_cpu = self._models.device == "cpu" and self._compute == MASTER
        return MASTER * self._policy.in_linear if on_cpu and not self._frozen else 0

    def _widened(self, shape: Shape) -> int:
        """The float32 copy of an output layer in bfloat16."""
        return MASTER * _output_layer(shape) if self._config.model.float32_logits else 0


def _output_layer(shape: Shape) -> int:
    """Parameters of the output layer, tied to the embedding or not."""
    return shape.vocabulary * shape.hidden


def kept_for_backward(
    shape: Shape, rows: int, length: int, width: int, *, checkpointing: bool
) -> int:
    """Computes the bytes that autograd keeps from a forward pass for the backward pass.

    In float32 a layer keeps 6·H (each norm's input, normalised input and output), 4·A (queries,
    expanded keys and values, output) and 2·I of a gated MLP (gate and up; 4·I if its activation and
    their product are not computed again). Under autocast the norms stay float32, and each product
    keeps a bfloat16 copy of its input. If there is a mask, each layer of a fused kernel converts
    it, L×L per row; one for each head is float32 already, so that all layers keep the same. Without
    a fused kernel a layer keeps the float32 softmax of its scores, a bfloat16 copy, and what a soft
    cap returns.

    Args:
        shape: the model's shape.
        rows: n.
        length: L.
        width: bytes of the compute dtype.
        checkpointing: activation checkpointing keeps a layer's input and recomputes the rest.
    """
    h, a, i = shape.hidden, shape.attention, shape.intermediate
    wide = 2 if shape.recomputes_products and not checkpointing else 4
    layer = 4 * (6 * h + 4 * a) if width == MASTER else 26 * h + 8 * a
    layer += wide * width * i
    tokens = rows * length
    one_layer = tokens * layer
    outside = 3 * MASTER * h * tokens
    if shape.needs_mask(length) and not shape.score_heads:
        mask = rows * length**2 * shape.mask_heads * width
        if shape.mask_heads > 1 and width == MASTER:
            outside += mask
        else:
            one_layer += mask
    of_score = MASTER + (width if width != MASTER else 0) + (width if shape.capped_scores else 0)
    one_layer += rows * length**2 * shape.score_heads * of_score
    if checkpointing:
        return shape.layers * tokens * MASTER * h + one_layer + outside
    return shape.layers * one_layer + outside


def forward_activations(shape: Shape, rows: int, length: int, width: int, *, masked: bool) -> int:
    """Bytes of a forward pass without gradients: the residual stream and one layer's tensors.

    With a mask also its L×L per row, as bool and in the compute dtype; one for each head as float32
    and, in bfloat16, as two copies of it. Without a fused kernel also float32 tensors of L×L per
    row and head, of which :attr:`Shape.score_tensors` are alive at once.
    """
    h, a, i = shape.hidden, shape.attention, shape.intermediate
    of_mask = 1 + width
    if shape.mask_heads > 1:
        of_mask = shape.mask_heads * (MASTER if width == MASTER else MASTER + 2 * width)
    mask = rows * length**2 * of_mask if masked else 0
    scores = shape.score_tensors * MASTER * rows * length**2 * shape.score_heads
    return rows * length * (2 * MASTER * h + width * max(h + 3 * i, 2 * h + 6 * a)) + mask + scores
