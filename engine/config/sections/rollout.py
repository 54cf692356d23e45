"""The sections `rollout` and `eval`: generation of responses, for training and for evaluation."""

from typing import Annotated, Literal, Self

from msgspec import Meta
from msgspec.structs import replace

from engine.config.sections.base import (
    Bounded,
    Count,
    LinkPath,
    PathOrName,
    Positive,
    Section,
    Whole,
)
from engine.config.sections.reward import RewardSource


class EvalConfig(Section, frozen=True):
    """Held-out evaluation: the policy's responses to prompts that are never trained on.

    It is repeated with the same prompts and random numbers, before the first step and every `every`
    steps, so its curves compare steps with each other.
    """

    every: Whole = 0
    """Number of steps between evaluations; 0 for none."""
    prompts: PathOrName | None = None
    """A file or data set like `data.prompts`; prompts that are also trained on are left out.
    Default: the prompts of `holdout`."""
    column: str | None = None
    """The column that holds the prompt. Default: `data.column`."""
    split: str = "test"
    """The split of a data set on the hub, or of a folder."""
    holdout: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """Number of prompts of `data.prompts` that are never trained on but evaluated; the seed
    determines which."""
    max_prompts: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    """Maximum number of prompts to evaluate, counted from the first."""
    per_prompt: Annotated[int, Meta(ge=1, le=10_000)] = 1
    """Responses to each prompt."""
    temperature: Annotated[float, Meta(ge=0, le=1000)] | None = None
    """Temperature of the responses; 0 takes the most likely token. Default: 1."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Maximum length of a response. Default: `rollout.max_new_tokens` at the start of the run."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """Determines the random numbers of the responses, which are the same at every evaluation."""
    rewards: list[RewardSource] = []
    """Reward sources besides those of `reward`. They are reported as `eval/reward/NAME` and have no
    influence on training; `weight` and `normalise` have no effect."""


class RolloutConfig(Section, frozen=True):
    """Generation of responses."""

    engine: Literal["native", "vllm"] = "native"
    """What generates responses: `native`, the trained model itself, in the rank that trains it;
    `vllm`, vLLM in a separate process, which gets the weights before each step."""
    python: LinkPath | None = None
    """The Python that runs vLLM; its environment may have another transformers. Default: this one,
    or that of `make vllm` if this one has no vLLM."""
    gpus: list[Whole] = []
    """Indices of the GPUs that vLLM uses, as numbered by the driver. Default: `launch.gpus`."""
    engines: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Processes of vLLM among which the responses of a batch are divided (data parallel). Each has
    `tensor_parallel` GPUs, in the order of `gpus`. Responses change by rounding only."""
    joined: Whole = 0
    """How many of the `engines`, the last ones, run on other machines, each started there by
    `rlhf-tui join --rollout`. Needs `rendezvous` and `transfer: file`."""
    rendezvous: str | None = None
    """`HOST:PORT` at which machines that generate reach this one; required if `joined` is above 0.
    Another port than that of `launch.rendezvous`."""
    tensor_parallel: Annotated[int, Meta(ge=1, le=1024)] = 1
    """GPUs (or processes on a CPU) that each of the `engines` divides the model among."""
    cache_gb: Positive | None = None
    """Size of the key-value cache of each of the `engines`, in 10⁹ bytes. Responses that do not fit
    wait. Default: what the responses of a step need, but no more than 4."""
    transfer: Literal["file", "ipc", "broadcast"] = "file"
    """How the weights reach vLLM: by a `file` in shared memory, by `ipc` on the GPU that vLLM
    shares with rank 0, or by a `broadcast` to its workers (NCCL between GPUs, gloo on a CPU)."""
    sleep: Annotated[int, Meta(ge=0, le=2)] = 0
    """Level of vLLM's sleep mode between batches, which frees GPU memory for the ranks: 1 keeps the
    weights in host memory, 2 has them sent again for each batch; 0 for none."""
    ahead: Annotated[int, Meta(ge=0, le=1)] = 0
    """With 1, the responses of the next step are generated during the rest of a step, with weights
    that are one update old when they are trained on (`rollout.engine: vllm` only; needs
    `ppo.rollout_correction`)."""
    batch_size: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    """Responses per step, over all ranks. More make the gradient less noisy and a step longer."""
    at_once: Count | None = None
    """Maximum number of responses that a rank generates at once; the others wait until one has
    ended. Limits the memory of the key-value cache; responses change by rounding only. Default: all
    of them."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether `native` compiles the model's layers for decoding (torch.compile), which takes 10 to
    20 s once per start and needs a C compiler. `auto`: on a GPU, for layers of 50 million weights
    or more, without `model.kernels: liger`. A model that cannot be compiled is used as it is."""
    per_prompt: Count | None = None
    """Responses to each prompt. Default: that of `ppo.advantage`."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    """Maximum length of a response, in tokens; longer responses are truncated."""
    temperature: Annotated[float, Meta(ge=1e-6, le=1000)] = 1.0
    """Divides the logits of the policy and of the reference, in generation and in training."""
    sampling: Literal["gumbel", "inverse_cdf"] = "gumbel"
    """How a token is chosen by its random number. The distribution is the same. With `gumbel`, the
    rounding of another processor or another number of ranks changes about one token in a million;
    with `inverse_cdf` up to some thousand. Sessions that began before this key use the latter."""
    stop: list[str] = []
    """Texts that end a response, in addition to the end-of-sequence token."""
    dynamic: bool = False
    """Replace prompts whose responses all have the same raw score with other prompts (DAPO's
    dynamic sampling). Needs `per_prompt` of at least 2."""
    dynamic_range: tuple[Bounded, Bounded] | None = None
    """With `dynamic`, also replaces prompts whose mean raw score is not above the first and below
    the second number: those that are too hard or too easy. Default: any mean."""
    dynamic_limit: Annotated[int, Meta(ge=1, le=1000)] = 10
    """How many times a step replaces prompts with `dynamic`; the remaining ones are then kept."""

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM generates, in processes that the run starts."""
        return self.engine == "vllm"

    def in_process(self) -> Self:
        """The same in this process alone: native rollouts, which differ by rounding."""
        return self if self.engine == "native" else replace(self, engine="native", ahead=0)

    @property
    def local_engines(self) -> int:
        """How many of the `engines` run on the first machine of the run."""
        return self.engines - self.joined
