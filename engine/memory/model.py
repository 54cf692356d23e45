"""What a run's memory is planned with: the models' shapes, the ranks' layout, the estimate.

:mod:`engine.train.models.shapes` finds the shapes, :mod:`engine.memory.estimate` does the
arithmetic, :mod:`engine.memory.advice` compares it with what :mod:`engine.memory.capacity` finds.
All sizes are in bytes.
"""

from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from engine.config.schema import RunConfig

WHAT_IF_RANK = 16
"""Of LoRA, where the configuration names none and the planner shows what it would save."""


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
    """What the configuration asks for; `auto` is ddp."""
    strategy: Any = "fsdp" if config.parallel.strategy == "fsdp" else "ddp"
    return Layout(
        strategy=strategy if ranks > 1 else "one", ranks=ranks, lora_rank=lora_rank(config)
    )


def lora_rank(config: RunConfig) -> int | None:
    """The rank of `lora`, if the run uses it."""
    return config.lora.rank
