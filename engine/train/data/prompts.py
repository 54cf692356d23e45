"""The prompts, in an order that a step's number determines."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine import starter
from engine.config.file import DATA_FILES
from engine.config.schema import DataConfig
from engine.errors import UserInputError
from engine.train.data.randomness import permutation

log = logging.getLogger("engine")


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be continued."""

    ids: list[int]
    text: str
    """As the model reads it: for chat messages, rendered by its template."""
    row: dict[str, Any]
    """The data set's row, for reward functions."""
    messages: list[dict[str, str]] | None = None
    """Where the prompt is a conversation."""


class Prompts:
    """All prompts of a run; :meth:`for_step` says which are a step's."""

    def __init__(self, prompts: list[Prompt], *, per_step: int, shuffle: bool, seed: int) -> None:
        self._prompts = prompts
        self._per_step = per_step
        self._shuffle = shuffle
        self._seed = seed

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(p.ids) for p in self._prompts)

    def pack(self) -> bytes:
        """All of them but their rows, for ranks that have no files; see :meth:`unpack`."""
        plain = [(p.ids, p.text, p.messages) for p in self._prompts]
        return msgspec.msgpack.encode((plain, self._per_step, self._shuffle, self._seed))

    @classmethod
    def unpack(cls, data: bytes) -> "Prompts":
        """What :meth:`pack` packed. Rows are empty: reward functions are rank 0's to call."""
        plain, per_step, shuffle, seed = msgspec.msgpack.decode(data)
        prompts = [Prompt(ids, text, {}, messages) for ids, text, messages in plain]
        return cls(prompts, per_step=per_step, shuffle=shuffle, seed=seed)

    def for_step(self, step: int) -> list[Prompt]:
        """The prompts of step `step` (from 1).

        The data is read pass after pass, each in an order of its own, and wraps inside a step where
        it is shorter than one.
        """
        first = (step - 1) * self._per_step
        return [self._at(first + i) for i in range(self._per_step)]

    def find(self, text: str) -> Prompt | None:
        """The prompt of these words, as the model reads them; of several the first."""
        return next((p for p in self._prompts if p.text == text), None)

    def _at(self, position: int) -> Prompt:
        turn, index = divmod(position, len(self))
        if self._shuffle:
            index = int(self._order(turn)[index])
        return self._prompts[index]

    def _order(self, turn: int) -> Tensor:
        if getattr(self, "_turn", None) != turn:
            self._turn = turn
            self._order_now = permutation(self._seed, "data", (turn,), len(self))
        return self._order_now


def load_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, per_step: int, seed: int
) -> Prompts:
    """Reads, renders and tokenises; prompts over the token limit are left out.

    Raises:
        UserInputError: names the file, the column or the row, and what would be right.
    """
    rows = read_rows(config)
    if config.column not in rows[0]:
        raise UserInputError(
            f"data.column: no column '{config.column}' in {config.prompts}; "
            f"it has {', '.join(rows[0])}"
        )
    prompts = [_prompt(row, i, config, tokenizer) for i, row in enumerate(rows)]
    short = [p for p in prompts if 0 < len(p.ids) <= config.max_prompt_tokens]
    if not short:
        raise UserInputError(
            f"data.prompts: each of the {len(prompts)} prompts in {config.prompts} is empty or "
            f"longer than data.max_prompt_tokens ({config.max_prompt_tokens})"
        )
    if len(short) < len(prompts):
        log.warning(
            "%d of %d prompts left out: too long or empty", len(prompts) - len(short), len(prompts)
        )
    return Prompts(short, per_step=per_step, shuffle=config.shuffle, seed=seed)


def read_rows(config: DataConfig) -> list[dict[str, Any]]:
    """The rows of a file or of a hub data set, at least one. Raises UserInputError."""
    # Imported here: a second of pandas and pyarrow that only loading needs.
    import datasets  # noqa: PLC0415

    source = starter.resolve(config.prompts)
    kind = DATA_FILES.get(Path(source).suffix.lower())
    if kind is not None and not Path(source).is_file():
        raise UserInputError(f"data.prompts: no file at {source}")
    if kind is not None and Path(source).stat().st_size == 0:
        raise UserInputError(f"data.prompts: {source} is empty; give at least one prompt")
    datasets.disable_progress_bars()
    try:
        if kind is not None:
            data = datasets.load_dataset(kind, data_files=source, split="train")
        else:
            data = datasets.load_dataset(source, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserInputError(_unreadable(source, kind, error)) from error
    rows = data.to_list()
    if not rows:
        raise UserInputError(f"data.prompts: {source} holds no rows; give at least one prompt")
    return rows


def _unreadable(source: str, kind: str | None, error: Exception) -> str:
    if "corresponds to no data" in str(error):  # how `datasets` says that there are no rows
        return f"data.prompts: {source} holds no rows; give at least one prompt"
    cause = error.__cause__ or error
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    if kind is None:
        endings = ", ".join(DATA_FILES)
        return (
            f"data.prompts: '{source}' is neither a file ({endings}) here nor a data set to be had "
            f"from the hub: {first}"
        )
    return f"data.prompts: cannot read {source} as {kind}: {first}"


def tokenise_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A plain text's token ids, ready to be continued."""
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers end every text; a response cannot begin after the end.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _prompt(
    row: dict[str, Any], number: int, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Prompt:
    content = row[config.column]
    if isinstance(content, str):
        return Prompt(tokenise_prompt(tokenizer, content), content, row)
    messages = _messages(content)
    if messages is None:
        raise UserInputError(
            f"data.prompts: row {number + 1} of {config.prompts} has neither text nor chat "
            f"messages in column '{config.column}' but {type(content).__name__}"
        )
    if not tokenizer.chat_template:
        raise UserInputError(
            "data.prompts holds chat messages but the policy's tokenizer has no chat template: "
            "use a chat model or plain text"
        )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt(ids, str(text), row, messages)


def _messages(content: Any) -> list[dict[str, str]] | None:
    """Chat messages, if that is what it is."""
    if not isinstance(content, list) or not content:
        return None
    for message in content:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return None
    return [{"role": str(m["role"]), "content": str(m["content"])} for m in content]


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of a step, one row a response; left-padded."""

    prompts: list[Prompt]
    """One a response: answers to the same prompt lie next to each other."""
    ids: Tensor
    """(B, P) int64."""
    lengths: Tensor
    """(B,) int64."""

    def select(self, rows: Tensor) -> "PromptBatch":
        """Some of the rows; the width stays."""
        return PromptBatch(
            [self.prompts[i] for i in rows.tolist()], self.ids[rows], self.lengths[rows]
        )

    def to(self, device: torch.device) -> "PromptBatch":
        """The same on a device."""
        return PromptBatch(self.prompts, self.ids.to(device), self.lengths.to(device))


def batch_prompts(prompts: list[Prompt], per_prompt: int, filler: int) -> PromptBatch:
    """Left-pads with `filler`, a token whose meaning does not matter: lengths make the masks."""
    rows = [p for p in prompts for _ in range(per_prompt)]
    width = max(len(p.ids) for p in rows)
    ids = torch.full((len(rows), width), filler, dtype=torch.int64)
    for i, prompt in enumerate(rows):
        ids[i, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
    return PromptBatch(rows, ids, torch.tensor([len(p.ids) for p in rows]))
