"""Encodes prompts and responses for a reward model: token ids in padded batches.

Both a run's scoring and `rlhf-tui reward train` use it, so they read the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserInputError
from engine.train.data.chat_template import render_chat
from engine.train.data.prompts import Messages, Prompt


@dataclass(frozen=True)
class EncodedResponses:
    """Prompts with their responses as token ids, B rows."""

    sequences: list[list[int]]
    types: list[list[int]] | None
    """Token types, if the tokenizer uses them to distinguish the texts of a pair."""
    pad: int | None
    """The token id to pad with; None to choose one for each batch."""
    vocabulary: int
    """Number of token ids of the model."""

    def __len__(self) -> int:
        return len(self.sequences)

    def by_length(self) -> list[int]:
        """Returns all row indices, longest rows first."""
        return sorted(range(len(self)), key=lambda i: len(self.sequences[i]), reverse=True)

    def pad_of(self, rows: Sequence[int]) -> int:
        """Returns the token id to pad some rows with; set the model's `pad_token_id` to it.

        Raises:
            UserInputError: the rows use every token id.
        """
        if self.pad is not None:
            return self.pad
        # Decoder classifiers take the score at the last non-pad token; those with custom code may
        # take it before the first pad token.
        used = {token for i in rows for token in self.sequences[i]}
        last = {self.sequences[i][-1] for i in rows if self.sequences[i]}
        for taken in (used, last):
            if len(taken) < self.vocabulary:
                return next(pad for pad in range(self.vocabulary) if pad not in taken)
        raise UserInputError(
            f"the reward model has {self.vocabulary} tokens, and none is left to pad {len(rows)} "
            "responses with: lower reward.batch_size, or give the model a pad token that is not "
            "its end-of-sequence token"
        )

    def batch(
        self, rows: Sequence[int], device: torch.device, *, mask: bool = True
    ) -> dict[str, Tensor]:
        """The arguments of a forward pass: n rows, right-padded to the longest, (n, T) int64.

        `mask=False` leaves out the attention mask.
        """
        width = max(len(self.sequences[i]) for i in rows)
        ids = torch.full((len(rows), width), self.pad_of(rows))
        real, kinds = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        for k, i in enumerate(rows):
            ids[k, : len(self.sequences[i])] = torch.tensor(self.sequences[i])
            real[k, : len(self.sequences[i])] = 1
            if self.types is not None:
                kinds[k, : len(self.types[i])] = torch.tensor(self.types[i])
        inputs = {"input_ids": ids.to(device)}
        inputs |= {"attention_mask": real.to(device)} if mask else {}
        return inputs if self.types is None else inputs | {"token_type_ids": kinds.to(device)}


class RewardEncoding:
    """Turns prompts and responses into the token ids of a classifier.

    A classifier with the policy's vocabulary gets the prompt's and the response's token ids,
    end-of-sequence token included. Any other gets the text, tokenised by its own tokenizer and, for
    chat prompts, rendered by its own chat template; or prompt and response as a pair of texts.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        policy_vocabulary: dict[str, int],
        *,
        max_tokens: int,
        pair: bool,
    ) -> None:
        """Stores how to encode.

        Args:
            tokenizer: the classifier's; its truncation side may be changed.
            model: the classifier.
            policy_vocabulary: token ids by token.
            max_tokens: the maximum number of tokens; the classifier's own limit may be lower.
            pair: whether the tokenizer gets prompt and response as a pair of texts.
        """
        self._tokenizer = tokenizer
        self._pad = _pad_id(tokenizer, model.config)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._pair = pair
        self._limit = min(max_tokens, _positions(model) or max_tokens)
        self.same_tokens = not pair and tokenizer.get_vocab() == policy_vocabulary
        """Whether it reads the policy's tokens instead of text."""
        if not self.same_tokens:
            # The end of the response counts; special tokens at the start are kept.
            tokenizer.truncation_side = "left"
            self._limit = min(self._limit, tokenizer.model_max_length)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[list[int]],
        texts: Sequence[str],
        messages: Sequence[Messages] | None = None,
    ) -> EncodedResponses:
        """Encodes B responses; keeps only the last tokens of those that are too long.

        Args:
            prompts: the prompt of each response.
            ids: the responses as token ids of the policy.
            texts: the responses as text, without special tokens.
            messages: the responses as chat messages. Default: one message each.
        """
        if self.same_tokens:
            joined = [p.ids + i for p, i in zip(prompts, ids, strict=True)]
            return self._encoded([row[-self._limit :] for row in joined], None)
        if messages is None:
            messages = [[{"role": "assistant", "content": text}] for text in texts]
        encoded = [self._encode(p, t, m) for p, t, m in zip(prompts, texts, messages, strict=True)]
        sequences = [list(e["input_ids"]) for e in encoded]
        types = [list(e["token_type_ids"]) for e in encoded if self._pair and "token_type_ids" in e]
        return self._encoded(sequences, types or None)  # also None on a rank without responses

    def random_rows(self, lengths: Sequence[int]) -> EncodedResponses:
        """Returns rows of random tokens, the same in each call."""
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(self._vocabulary, (n,), generator=generator) for n in lengths]
        used = [[(t + (t == self._pad)) % self._vocabulary for t in r.tolist()] for r in rows]
        return self._encoded([row[: self._limit] for row in used], None)

    def _encoded(
        self, sequences: list[list[int]], types: list[list[int]] | None
    ) -> EncodedResponses:
        return EncodedResponses(sequences, types, self._pad, self._vocabulary)

    def _encode(self, prompt: Prompt, response: str, messages: Messages) -> Any:
        """Encodes a prompt and a response with the classifier's own tokenizer."""
        if self._pair:
            return self._encode_pair(prompt.plain, response)
        if prompt.messages is not None and self._tokenizer.chat_template:
            text = render_chat(self._tokenizer, [*prompt.messages, *messages], "reward.model")
            # The template writes the special tokens itself.
            return self._tokenizer(
                text, add_special_tokens=False, truncation=True, max_length=self._limit
            )
        return self._tokenizer(prompt.text + response, truncation=True, max_length=self._limit)

    def _encode_pair(self, prompt: str, response: str) -> Any:
        """Encodes a pair of texts; drops the prompt's first tokens if it is too long."""
        needed = len(self._tokenizer("", response)["input_ids"])
        strategy = "only_first" if needed < self._limit else "longest_first"
        return self._tokenizer(prompt, response, truncation=strategy, max_length=self._limit)


def _positions(model: Any) -> int | None:
    """Returns the most tokens a model can read; None if its positions are unlimited."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa counts positions from the one after that of padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            return int(limit - module.padding_idx - 1)
    return limit


def _pad_id(tokenizer: Any, config: Any) -> int | None:
    """The classifier's pad token id; None if it is also the end-of-sequence token.

    Decoder classifiers of transformers take the score at the last token that is not pad. If pad and
    end of sequence are the same token, that is the token before the end.
    """
    pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    return None if pad is None or pad == tokenizer.eos_token_id else int(pad)
