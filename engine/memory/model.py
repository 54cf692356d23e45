"""The structs of the memory planner: shapes of models, layout of ranks, estimate.

:mod:`engine.train.models.shapes` reads the shapes, :mod:`engine.memory.estimate` computes the
estimate and :mod:`engine.memory.advice` compares it with :mod:`engine.memory.capacity`. All sizes
are in bytes.
"""

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from engine.config.schema import RunConfig

LOGITS_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Most logits of a micro-batch in memory at a time, by device: 134 MB of float32 on a CPU, 0.5 GB
of bfloat16 on a GPU. See :mod:`engine.train.ppo.chunked_loss`."""
LOGITS_PIECE = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Number of logits whose float32 softmax is computed at a time. On a CPU 4 MB, which fit its cache
and, unlike larger blocks, stay with the allocator (`engine.launch.environment`). On a GPU each
piece costs a few kernel launches."""
WHAT_IF_RANK = 16
"""The LoRA rank of the planner's comparison if the configuration names none."""

Strategy = Literal["one", "ddp", "fsdp"]


class Shape(Struct, frozen=True, kw_only=True):
    """A model's sizes, read from its configuration."""

    parameters: int
    """The number of parameters; tied ones count once."""
    head: int = 0
    """Parameters of the language model head; 0 if it is tied to the embedding."""
    largest_layer: int
    """Parameters of one layer."""
    layers: int
    hidden: int
    attention: int
    """Heads × head size."""
    key_value: int
    """Key-value heads × head size."""
    intermediate: int
    """Width of the MLP; in a mixture of experts the width that one token uses."""
    vocabulary: int
    in_linear: int = 0
    """Parameters of the linear modules in all layers."""
    linear: dict[str, int] = {}
    """Module name → inputs + outputs of the linear modules of that name in all layers.

    Times the rank, this is the number of LoRA parameters."""
    outputs: dict[str, int] = {}
    """Module name → outputs of the same modules: the parameters that DoRA adds."""
    window: int | None = None
    """Positions that a token attends to in layers with a sliding window or chunks, 1 if the model
    makes a mask in any case; None if it needs none."""
    mask_heads: int = 1
    """Masks per row: one, or one for each head if the mask has the bias of positions (ALiBi)."""
    score_heads: int = 0
    """Heads whose attention scores, L×L per row, are in memory; 0 with a fused kernel."""
    capped_scores: bool = False
    """Whether these scores have a soft cap."""
    score_tensors: int = 3
    """float32 tensors of these scores that are alive at once in a forward pass, besides the mask:
    measured 2 to 3 for most architectures."""
    ignores_padding: bool = False
    """Whether it is a classifier whose score does not change with padding at the end, so that it
    gets no mask for it."""
    read_whole: bool = False
    """Whether all of it is in host memory while it is read, because transformers joins tensors."""
    recomputes_products: bool = False
    """Whether each layer has a gated MLP whose two products are computed again in training."""

    def needs_mask(self, length: int) -> bool:
        """Whether causal attention over `length` positions without padding needs a mask."""
        return self.window is not None and length >= self.window


class Models(Struct, frozen=True, kw_only=True):
    """The models and prompts of a run."""

    policy: Shape
    reference: Shape
    rewards: list[Shape] = []
    prompt_tokens: int
    """Length of the longest prompt, or the configured maximum."""
    exact_prompts: bool = False
    """Whether `prompt_tokens` was measured on the prompts."""
    process: int = 0
    """Host memory of a rank with all modules imported and no model loaded."""
    device: Literal["cpu", "cuda"] = "cpu"


class Layout(Struct, frozen=True, kw_only=True):
    """How the work is divided among ranks."""

    strategy: Strategy = "one"
    ranks: int = 1
    lora_rank: int | None = None
    """None if every weight is trained."""

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
        """Part → its largest size in any phase."""
        names = dict.fromkeys(n for parts in self.phases.values() for n in parts)
        return {n: max(p.get(n, 0) for p in self.phases.values()) for n in names}

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(self.totals.values())

    @property
    def fullest(self) -> str:
        """The phase of the peak."""
        totals = self.totals
        return max(totals, key=lambda name: totals[name])

    @property
    def metric(self) -> int:
        """Bytes that `perf/peak_memory_gb` will show; on a GPU, those that torch allocates."""
        return self.peak - self.parts.get("CUDA context", 0)


def layouts(config: RunConfig, ranks: int) -> list[Layout]:
    """The layouts to compare: one rank, ddp and fsdp, each with full training and with LoRA."""
    lora = config.lora.rank or WHAT_IF_RANK
    full = [Layout(), *(Layout(strategy=s, ranks=ranks) for s in ("ddp", "fsdp"))]
    return [*full, *(replace(layout, lora_rank=lora) for layout in full)]


def configured(config: RunConfig, ranks: int) -> Layout:
    """The configured layout; the strategy `auto` counts as ddp, see :func:`.layout_at_start`."""
    strategy: Strategy = "one"
    if ranks > 1:
        strategy = "fsdp" if config.parallel.strategy == "fsdp" else "ddp"
    return Layout(strategy=strategy, ranks=ranks, lora_rank=config.lora.rank)
