"""The tasks of the benchmarks: models with random weights, a tokenizer and prompts.

Nothing is downloaded. With random weights the end-of-sequence token is sampled with probability one
in the size of the vocabulary, so almost all responses have the maximum length and all sides do the
same work.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

SPECIAL = ("<eos>", "<pad>", "<unk>")


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama-like model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self, **more: Any) -> LlamaConfig:
        """The configuration for transformers, with tied embeddings."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
            **more,
        )


SMOL_135M = Shape(576, 1536, 30, 9, 3, 49152)
"""The shape of SmolLM2-135M."""
HALF_BILLION = Shape(896, 4864, 24, 14, 2, 151936)
"""The shape of Qwen2.5-0.5B."""
TINY = Shape(128, 384, 4, 4, 2, 4096)
"""A shape for quick runs."""


@dataclass(frozen=True)
class Task:
    """The size of one PPO iteration."""

    shape: Shape
    prompts: int = 16
    prompt_tokens: int = 16
    new_tokens: int = 24
    epochs: int = 2
    minibatches: int = 1
    micro_batch: int = 8

    @property
    def response_tokens(self) -> int:
        """Tokens of all responses of an iteration."""
        return self.prompts * self.new_tokens


SMALL_TASK = Task(SMOL_135M)
GPU_TASK = Task(HALF_BILLION, 64, 128, 256, 2, 1, 8)


def write_models(folder: Path, task: Task) -> None:
    """Writes policy, value model, reward model, tokenizer and prompts.jsonl to `folder`."""
    disable_progress_bar()  # it would stand within the tables
    torch.manual_seed(0)
    tokenizer = _tokenizer(task.shape.vocabulary)
    LlamaForCausalLM(task.shape.config()).save_pretrained(folder / "policy")
    for name in ("value", "reward"):
        model = LlamaForSequenceClassification(task.shape.config(num_labels=1))
        model.save_pretrained(folder / name)
    for name in ("policy", "value", "reward"):
        tokenizer.save_pretrained(folder / name)
    drawn = torch.randint(
        len(SPECIAL), task.shape.vocabulary, (4 * task.prompts, task.prompt_tokens)
    )
    rows = [{"prompt": " ".join(f"w{i}" for i in row)} for row in drawn.tolist()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; the words are w3, w4 and so on."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), size))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
