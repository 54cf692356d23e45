"""A prompt, and batches of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Messages = list[dict[str, str]]
"""Chat messages, with `role` and `content`."""


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt."""

    ids: list[int]
    text: str
    """The text that `ids` encode: chat messages are rendered by the chat template."""
    row: dict[str, Any]
    """The data set's row, for reward functions; empty on ranks other than 0."""
    messages: Messages | None = None
    """The chat messages, if the prompt is a conversation."""

    @property
    def plain(self) -> str:
        """The prompt as text, without the markup of a chat template."""
        if self.messages is None:
            return self.text
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return plain_conversation(self.messages)


def plain_conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages as text, each after its role, without the markup of a chat template."""
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of B responses, left-padded to P tokens."""

    prompts: list[Prompt]
    """One per response; responses to the same prompt are in adjacent rows."""
    ids: Tensor
    """(B, P) int64."""
    lengths: Tensor
    """(B,) int64: tokens of each prompt, padding excluded."""

    def select(self, rows: Tensor) -> "PromptBatch":
        """Selects the rows with these indices, (n,) int64; P stays the same."""
        return PromptBatch(
            [self.prompts[i] for i in rows.tolist()], self.ids[rows], self.lengths[rows]
        )

    def to(self, device: torch.device) -> "PromptBatch":
        """Returns a copy with its tensors on a device."""
        return PromptBatch(self.prompts, self.ids.to(device), self.lengths.to(device))


def replace_prompts(
    batch: PromptBatch, rows: Tensor, other: PromptBatch, other_rows: Tensor
) -> PromptBatch:
    """Replaces some rows by those of another batch; left-pads to the longer of the two widths."""
    width = max(batch.ids.shape[1], other.ids.shape[1])
    ids, new = (torch.nn.functional.pad(x.ids, (width - x.ids.shape[1], 0)) for x in (batch, other))
    prompts = list(batch.prompts)
    for row, other_row in zip(rows.tolist(), other_rows.tolist(), strict=True):
        prompts[row] = other.prompts[other_row]
    return PromptBatch(
        prompts,
        ids.index_copy(0, rows.to(ids.device), new[other_rows]),
        batch.lengths.index_copy(0, rows.to(ids.device), other.lengths[other_rows]),
    )


def batch_prompts(prompts: list[Prompt], per_prompt: int, pad: int) -> PromptBatch:
    """Repeats each prompt `per_prompt` times and left-pads with the token id `pad`.

    `pad` may be any token id: masks are made from lengths.
    """
    rows = [p for p in prompts for _ in range(per_prompt)]
    width = max(len(p.ids) for p in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    for i, prompt in enumerate(rows):
        ids[i, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
    return PromptBatch(rows, ids, torch.tensor([len(p.ids) for p in rows]))
