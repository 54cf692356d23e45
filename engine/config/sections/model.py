"""The sections `data`, `model` and `lora`: what is trained, and on which prompts."""

from typing import Any, Literal

from engine.config.sections.base import Count, Section


class DataConfig(Section, frozen=True):
    """The prompts that the policy is trained on."""

    prompts: str
    """A .jsonl, .json, .csv or .parquet file, the id of a data set on the hub, or
    `starter:prompts`."""
    column: str = "prompt"
    """The column that holds the prompt: text, or a list of chat messages (`role`, `content`)."""
    chat: bool = False
    """Make a prompt that is text the message of a user, rendered by the chat template."""
    system: str | None = None
    """A system message in front of conversations that have none."""
    chat_template: str | None = None
    """A chat template in place of the one in the policy's tokenizer: a file, or Jinja text. It is
    saved with the policy."""
    template_arguments: dict[str, Any] | None = None
    """Variables of the chat template, such as `{enable_thinking: false}`."""
    split: str = "train"
    """The split of a data set on the hub."""
    max_prompt_tokens: Count = 512
    """Longer prompts are skipped; the log states how many."""
    shuffle: bool = True
    """Shuffle the prompts for each pass over the data; the seed determines the order."""


class ModelConfig(Section, frozen=True):
    """The policy, the reference and the value function."""

    policy: str
    """The model to train: a Hugging Face model folder, a hub id, or `starter:policy`."""
    revision: str | None = None
    """Branch, tag or commit of a policy on the hub. Default: its main branch."""
    gguf_file: str | None = None
    """Name of a GGUF file in the policy's folder or repository. Its weights are trained in float32,
    whatever the quantisation that they were stored with. Needs the extra `gguf`."""
    reference: str | None = None
    """The model that the KL is measured against. Default: the policy before training."""
    reference_revision: str | None = None
    """Branch, tag or commit of `reference` on the hub."""
    trust_remote_code: bool = False
    """Run the Python code that a policy or a reference brings along. It can do whatever you can do
    on this machine: read it first, and give a commit as `revision`."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """How the policy and the reference compute attention. Default: transformers' choice, mostly
    `sdpa`. `flash_attention_2` needs the package flash-attn and `dtype: bfloat16`."""
    value: Literal["shared", "separate"] = "shared"
    """Whether the value head shares the policy's transformer or has a separate one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the forward and backward passes. Trained weights are kept in float32."""
    kernels: Literal["torch", "liger"] = "torch"
    """`liger` computes norms, rotary embeddings and MLPs of the policy and the reference with
    liger-kernel's fused kernels: faster on a GPU, most of all while generating. Needs the extra
    `gpu`."""


class LoRAConfig(Section, frozen=True):
    """Low-rank adapters (LoRA): trains small adapters and freezes the weights of the model.

    The reference is the policy with its adapters disabled, so the weights are held in memory once,
    in `model.dtype`. Adapters need about ten times the learning rate of full training.
    """

    rank: Count | None = None
    """Rank of the adapters. Default: no adapters, all weights are trained."""
    alpha: Count | None = None
    """An adapter's output is scaled by alpha / rank. Default: twice the rank."""
    targets: list[str] = []
    """Linear layers that get adapters, by the end of their names (`q_proj`). Default: all linear
    layers except the output layer."""
