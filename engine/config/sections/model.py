"""The sections `data`, `model` and `lora`: what is trained, and on which prompts."""

from typing import Any, Literal

from msgspec.structs import replace

from engine.config.sections.base import Count, LinkPath, PathOrName, Positive, Section

MIXTURE_CYCLE = 10_000
"""Prompts in which several data sets have their exact shares, so no weight may be smaller."""

RSLORA_ALPHA = 16
"""Default of `lora.alpha` with `lora.rslora`, the same for all ranks, as in the paper."""


class PromptSource(Section, frozen=True):
    """One of several data sets."""

    path: PathOrName
    """A file, a folder, the id of a data set on the hub, or `starter:prompts`, like
    `data.prompts`."""
    weight: Positive = 1.0
    """Share of the prompts that are drawn from this data set, relative to the other weights."""
    column: str | None = None
    """The column that holds the prompt. Default: `data.column`."""
    split: str | None = None
    """The split of a data set on the hub, or of a folder. Default: `data.split`."""


class DataConfig(Section, frozen=True):
    """The prompts that the policy is trained on."""

    prompts: PathOrName | list[PromptSource]
    """A .jsonl, .json, .csv or .parquet file, a folder of such files or one that `save_to_disk` of
    the library `datasets` has written, the id of a data set on the hub, or `starter:prompts`; or a
    list of several, each with its weight."""
    column: str = "prompt"
    """The column that holds the prompt: text, or a list of chat messages (`role`, `content`). Data
    without a column `prompt` may have `chosen` and `rejected`, or `messages` (docs/data.md)."""
    chat: bool = False
    """Treat a text prompt as a user message, rendered with the chat template."""
    system: str | None = None
    """System message for conversations that have none."""
    chat_template: PathOrName | None = None
    """Chat template to use instead of the one in the policy's tokenizer: a file, or Jinja text. It
    is saved with the policy."""
    template_arguments: dict[str, Any] | None = None
    """Variables of the chat template, such as `{enable_thinking: false}`."""
    split: str = "train"
    """The split of a data set on the hub, or of a folder."""
    max_prompt_tokens: Count = 512
    """Longer prompts are skipped; the log states how many."""
    min_prompt_tokens: Count = 1
    """Shorter prompts are skipped, too."""
    shuffle: bool = True
    """Shuffle the prompts for each pass over the data; the seed determines the order."""
    cache: LinkPath | None = None
    """Folder for the tokens of large data sets, which later starts read instead of tokenising
    again. Default: `rlhf-tui/prompts` in `$XDG_CACHE_HOME` or in `~/.cache`; where that cannot be
    written, a private folder under `$TMPDIR`."""

    @property
    def sources(self) -> list[PromptSource]:
        """The data sets, with their columns and splits."""
        given = [PromptSource(path=self.prompts)] if isinstance(self.prompts, str) else self.prompts
        return [
            replace(s, column=s.column or self.column, split=s.split or self.split) for s in given
        ]


class ModelConfig(Section, frozen=True):
    """The policy, the reference and the value function."""

    policy: PathOrName
    """The model to train: a Hugging Face model folder, a hub id, or `starter:policy`. A folder of
    LoRA adapters is merged into the base model that it names."""
    revision: str | None = None
    """Branch, tag or commit of a policy on the hub. Default: its main branch."""
    gguf_file: str | None = None
    """Name of a GGUF file in the policy's folder or repository. Its weights are trained in float32,
    however they were quantised. Needs the extra `gguf`."""
    reference: PathOrName | None = None
    """The model that the KL is measured against. Default: the policy before training."""
    reference_revision: str | None = None
    """Branch, tag or commit of `reference` on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with a policy or a reference. It can do whatever you can do on
    this machine, so read it first, and give a commit as `revision`."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """How the policy and the reference compute attention. Default: transformers' choice, mostly
    `sdpa`. `flash_attention_2` needs the package flash-attn and `dtype: bfloat16`."""
    value: Literal["shared", "separate", "reward_model"] = "shared"
    """What the value function reads: `shared`, the policy's transformer; `separate`, a second
    transformer; `reward_model`, the reward model's hidden states from scoring, to which a linear
    function is fitted in each step. `reward_model` learned most on the starter. It needs exactly
    one reward model, which reads the policy's tokens (docs/ppo.md)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the forward and backward passes. Choose `bfloat16` on a GPU: matrix products are
    many times faster there. Trained weights are kept in float32 in either case."""
    float32_logits: bool = False
    """With `dtype: bfloat16`, computes the output layer of policy and reference in float32
    (MiniMax-M1, ScaleRL). In bfloat16 a logit of 10 is rounded by up to 0.03, which is a large part
    of the difference between a token's log-probabilities in generation, update and reference."""
    kernels: Literal["torch", "liger"] = "torch"
    """`liger` computes norms, rotary embeddings and MLPs of the policy and the reference with
    liger-kernel's fused kernels: faster on a GPU, most of all while generating. Needs the extra
    `gpu`."""

    @property
    def reference_is_policy(self) -> bool:
        """Whether the reference is the policy before training, also if it is named once more."""
        named = (self.reference, self.reference_revision, None)
        return self.reference is None or named == (self.policy, self.revision, self.gguf_file)


class LoRAConfig(Section, frozen=True):
    """Low-rank adapters (LoRA): trains small adapters and freezes the weights of the model.

    The reference is the policy with its adapters disabled, so the weights are held in memory once,
    in `model.dtype`. Adapters need about ten times the learning rate of full training.
    """

    rank: Count | None = None
    """Rank of the adapters; 8 to 64 are usual. Default: no adapters, all weights are trained."""
    alpha: Count | None = None
    """An adapter's output is scaled by alpha / rank. Default: twice the rank; with `rslora` 16."""
    rslora: bool = False
    """Scale by alpha / √rank instead (rank-stabilised LoRA, Kalajdzievski 2023), so that one alpha
    suits all ranks, also of 64 and more."""
    dora: bool = False
    """Also train the length of each row of an adapted weight, so that the adapter changes its
    direction only (DoRA, Liu et al. 2024). Often better at small ranks. A pass over few tokens
    takes longer. Not with `parallel.strategy: fsdp`."""
    targets: list[str] = []
    """Linear layers that get adapters, by the end of their names (`q_proj`). Default: all linear
    layers except the output layer."""
    quantise: Literal["none", "nf4"] = "none"
    """`nf4` holds the frozen weights of the linear layers in 4 bits (QLoRA, Dettmers et al. 2023)
    instead of `model.dtype`: 0.56 bytes a weight. Each pass unpacks them first, which makes it
    slower. The embedding, the output layer and norms stay as they are. Needs `rank` and
    the extra `qlora`; not with `parallel.strategy: fsdp` or `rollout.engine: vllm`."""

    @property
    def can_shard(self) -> bool:
        """Whether `parallel.strategy: fsdp` is possible."""
        return self.quantise == "none" and not self.dora
