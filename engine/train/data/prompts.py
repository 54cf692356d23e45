"""Prompts: reading, tokenising, and their order, which the seed and the step determine."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine import starter
from engine.config.file import DATA_FILES
from engine.config.sections.model import DataConfig
from engine.errors import UserInputError, error_text, first_line
from engine.train.data.chat_template import render_chat
from engine.train.data.randomness import permutation

log = logging.getLogger("engine")

MAX_NESTING = 50
"""Lists and objects inside each other in a line of JSON; `datasets` fails from about 60 on."""
JSON_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]')
"""Strings, which may contain brackets, and brackets."""
LONG_TEXT = 10_000
"""Characters of a prompt up to which it is tokenised whatever the limit."""


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt."""

    ids: list[int]
    text: str
    """The text that `ids` encode: chat messages are rendered by the chat template."""
    row: dict[str, Any]
    """The data set's row, for reward functions; empty on ranks other than 0."""
    messages: list[dict[str, str]] | None = None
    """The chat messages, if the prompt is a conversation."""

    @property
    def plain(self) -> str:
        """The prompt without the markup of a chat template."""
        if self.messages is None:
            return self.text
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


class Prompts:
    """All prompts of a run; :meth:`for_step` selects those of a step."""

    def __init__(self, prompts: list[Prompt], *, per_step: int, shuffle: bool, seed: int) -> None:
        self._prompts = prompts
        self._per_step = per_step
        self._shuffle = shuffle
        self._seed = seed
        self._pass = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def longest(self) -> int:
        """Length of the longest prompt, in tokens."""
        return max(len(p.ids) for p in self._prompts)

    def pack(self) -> bytes:
        """Serialises the prompts without their rows, for ranks that do not read the data."""
        plain = [(p.ids, p.text, p.messages) for p in self._prompts]
        return msgspec.msgpack.encode((plain, self._per_step, self._shuffle, self._seed))

    @classmethod
    def unpack(cls, data: bytes) -> "Prompts":
        """Restores :meth:`pack`'s result. Rows are empty: only rank 0 calls reward functions."""
        plain, per_step, shuffle, seed = msgspec.msgpack.decode(data)
        prompts = [Prompt(ids, text, {}, messages) for ids, text, messages in plain]
        return cls(prompts, per_step=per_step, shuffle=shuffle, seed=seed)

    def for_step(self, step: int) -> list[Prompt]:
        """The prompts of a step, counted from 1.

        Steps read the data in passes, each with its own permutation if `data.shuffle` is true. A
        step may span two or more passes.
        """
        first = (step - 1) * self._per_step
        return [self._at(first + i) for i in range(self._per_step)]

    def replacements(self, step: int, attempt: int, count: int) -> list[Prompt]:
        """Prompts in place of some of a step's, for `rollout.dynamic`: any `count` of the data.

        Seed, step and attempt determine them. No prompt repeats unless there are fewer than
        `count`.
        """
        chosen = permutation(self._seed, "redraw", (step, attempt), len(self)).tolist()
        return [self._prompts[chosen[i % len(self)]] for i in range(count)]

    @property
    def all(self) -> list[Prompt]:
        """All prompts, in the order of the data."""
        return self._prompts

    @property
    def texts(self) -> set[str]:
        """The texts of all prompts."""
        return {p.text for p in self._prompts}

    def hold_out(self, count: int) -> tuple["Prompts", list[Prompt]]:
        """Splits off `count` prompts for evaluation; the seed determines which.

        Prompts with the text of one that is held out leave the training prompts as well.

        Returns:
            The prompts for training, and those that are held out.

        Raises:
            UserInputError: no prompt would be left for training.
        """
        order = permutation(self._seed, "holdout", (), len(self)).tolist()
        held = [self._prompts[i] for i in sorted(order[:count])]
        texts = {p.text for p in held}
        rest = [p for p in self._prompts if p.text not in texts]
        if not rest or len(held) < count:
            raise UserInputError(
                f"eval.holdout ({count}) leaves no prompt of the {len(self)} in data.prompts for "
                "training: lower it, or give eval.prompts"
            )
        kept = Prompts(rest, per_step=self._per_step, shuffle=self._shuffle, seed=self._seed)
        return kept, held

    def find(self, text: str) -> Prompt | None:
        """The first prompt with exactly this :attr:`Prompt.text`, or None."""
        return next((p for p in self._prompts if p.text == text), None)

    def _at(self, position: int) -> Prompt:
        number, index = divmod(position, len(self))
        if self._shuffle:
            index = int(self._order_of(number)[index])
        return self._prompts[index]

    def _order_of(self, number: int) -> Tensor:
        """The permutation of a pass, counted from 0; the last one is cached."""
        if self._pass != number:
            self._pass = number
            self._order = permutation(self._seed, "data", (number,), len(self))
        return self._order


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    per_step: int,
    seed: int,
    key: str = "data",
) -> Prompts:
    """Reads and tokenises all prompts; leaves out those that are empty or too long.

    Args:
        config: the data set, its column and `max_prompt_tokens`.
        tokenizer: the policy's.
        per_step: prompts of a step, over all ranks.
        seed: determines the order.
        key: the configuration section that errors name.

    Raises:
        UserInputError: the data cannot be read, or has no usable prompt. Names the file, the
            column or the row.
    """
    try:
        return _load(config, tokenizer, per_step=per_step, seed=seed)
    except UserInputError as error:
        if key == "data":
            raise
        raise UserInputError(str(error).replace("data.", f"{key}.", 1)) from error


def _load(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, per_step: int, seed: int
) -> Prompts:
    rows = read_rows(config)
    if config.column not in rows[0]:
        raise UserInputError(
            f"data.column: no column '{config.column}' in {config.prompts}; "
            f"it has {', '.join(rows[0])}"
        )
    prompts = [_prompt(row, i, config, tokenizer) for i, row in enumerate(rows)]
    usable = [p for p in prompts if 0 < len(p.ids) <= config.max_prompt_tokens]
    if not usable:
        raise UserInputError(
            f"data.prompts: each of the {len(prompts)} prompts in {config.prompts} is empty or "
            f"longer than data.max_prompt_tokens ({config.max_prompt_tokens})"
        )
    if len(usable) < len(prompts):
        log.warning(
            "%d of %d prompts left out: too long or empty", len(prompts) - len(usable), len(prompts)
        )
    return Prompts(usable, per_step=per_step, shuffle=config.shuffle, seed=seed)


def read_rows(config: DataConfig) -> list[dict[str, Any]]:
    """Reads a file or a hub data set; returns at least one row. Raises UserInputError."""
    # Imported here: pandas and pyarrow take about a second, and only rank 0 needs them.
    import datasets  # noqa: PLC0415

    source = starter.resolve(config.prompts)
    kind = DATA_FILES.get(Path(source).suffix.lower())
    if kind is not None and not Path(source).is_file():
        raise UserInputError(f"data.prompts: no file at {source}")
    if kind is not None and Path(source).stat().st_size == 0:
        raise UserInputError(f"data.prompts: {source} is empty; give at least one prompt")
    if kind == "json":
        _check_nesting(source)
    datasets.disable_progress_bars()
    try:
        if kind is not None:
            data = datasets.load_dataset(kind, data_files=source, split="train")
        else:
            data = datasets.load_dataset(source, split=config.split)
        rows: list[dict[str, Any]] = data.to_list()  # decodes the text
    except MemoryError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets raise almost any type
        raise UserInputError(_read_error(source, kind, error)) from error
    if not rows:
        raise UserInputError(f"data.prompts: {source} holds no rows; give at least one prompt")
    return rows


def _check_nesting(source: str) -> None:
    """Refuses JSON that is nested deeply; `datasets` would take minutes to fail on it.

    Only lines with many brackets are looked at closely, so this takes a second for some gigabytes.

    Raises:
        UserInputError: a line is nested deeper than :data:`MAX_NESTING`, or cannot be read.
    """
    try:
        with Path(source).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.count(b"[") + line.count(b"{") <= MAX_NESTING:
                    continue
                depth = 0
                for token in JSON_TOKENS.finditer(line):
                    depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
                    if depth > MAX_NESTING:
                        raise UserInputError(
                            f"data.prompts: line {number} of {source} is nested more than "
                            f"{MAX_NESTING} levels deep"
                        )
    except OSError as error:
        raise UserInputError(f"data.prompts: cannot read {source}: {error.strerror}") from error


def _read_error(source: str, kind: str | None, error: Exception) -> str:
    if "corresponds to no data" in error_text(error):  # the message of `datasets` for no rows
        return f"data.prompts: {source} holds no rows; give at least one prompt"
    first = first_line(error.__cause__ or error)
    if kind is None:
        endings = ", ".join(DATA_FILES)
        return (
            f"data.prompts: '{source}' is neither a local file ({endings}) nor a data set that the "
            f"hub provides: {first}"
        )
    return f"data.prompts: cannot read {source} as {kind}: {first}"


def tokenise_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a plain text, without a trailing end-of-sequence token."""
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers append it to every text, but the response continues the sequence.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _prompt(
    row: dict[str, Any], number: int, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Prompt:
    content = row[config.column]
    if config.chat and isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if isinstance(content, str):
        if config.system is not None:
            raise UserInputError(
                f"data.system needs conversations, and row {number + 1} of {config.prompts} is "
                "text: set data.chat: true to make text the message of a user"
            )
        if _is_too_long(content, config, tokenizer):
            return Prompt([], content, row)
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
            "use a chat model or plain text, or give data.chat_template"
        )
    if config.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system}, *messages]
    text = render_chat(
        tokenizer, messages, "data.prompts", add_generation_prompt=True,
        **config.template_arguments or {},
    )  # fmt: skip
    if _is_too_long(text, config, tokenizer):
        return Prompt([], text, row, messages)
    return Prompt(list(tokenizer(text, add_special_tokens=False)["input_ids"]), text, row, messages)


def _is_too_long(text: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has certainly more than `data.max_prompt_tokens` tokens.

    Tokenising a text of a megabyte can take half a minute, only to leave the prompt out.
    """
    if len(text) <= LONG_TEXT:
        return False
    longest_token = max(map(len, tokenizer.get_vocab()))
    return len(text) > max(LONG_TEXT, config.max_prompt_tokens * longest_token)


def _messages(content: Any) -> list[dict[str, str]] | None:
    """`content` as chat messages, or None if it is not a list of them."""
    if not isinstance(content, list) or not content:
        return None
    for message in content:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return None
    return [{"role": str(m["role"]), "content": str(m["content"])} for m in content]


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
        """The rows with these indices, (n,) int64; P stays the same."""
        return PromptBatch(
            [self.prompts[i] for i in rows.tolist()], self.ids[rows], self.lengths[rows]
        )

    def to(self, device: torch.device) -> "PromptBatch":
        """A copy with its tensors on a device."""
        return PromptBatch(self.prompts, self.ids.to(device), self.lengths.to(device))


def replace_prompts(
    batch: PromptBatch, rows: Tensor, other: PromptBatch, other_rows: Tensor
) -> PromptBatch:
    """A batch with some rows taken from another; left-padded to the longer of the two widths."""
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
