"""The byte-level BPE tokenizer of the starter models, and batching of sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCABULARY = 4096
MAX_POSITIONS = 256


def train_tokenizer(sentences: Iterable[str], folder: Path) -> None:
    """Train on ``sentences`` and save; ids 0, 1, 2 are pad, bos and eos.

    No token is added on encoding, and a sentence's first word has no leading space, so an
    opening's ids are a prefix of the ids of every sentence that continues it with a space.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_POSITIONS,
        padding_side="left",  # a policy is prompted in batches
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer saved by `train_tokenizer`."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of ``sentence<eos>`` for each text."""
    eos = tokenizer.eos_token_id
    return [[*ids, eos] for ids in tokenizer(list(texts)).input_ids]


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, both int64 of shape [rows, longest row]."""
    width = max(len(r) for r in rows)
    ids = torch.tensor([[*r, *[pad] * (width - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    return ids, mask


def by_length(rows: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """Return the rows in chunks of ``size``, each of rows of like length."""
    ordered = sorted(rows, key=len)
    return [ordered[k : k + size] for k in range(0, len(ordered), size)]
