"""Turns prompts into tokens, batch by batch."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from engine.config.sections.model import DataConfig
from engine.errors import UserInputError
from engine.train.data.chat_template import render_chat
from engine.train.data.prompt_table import SCHEMA
from engine.train.data.prompts import Messages

LONG_TEXT = 10_000
"""A prompt of at most this many characters is always tokenised."""
PARALLEL_VARIABLE = "TOKENIZERS_PARALLELISM"


class PromptTokenizer:
    """Renders and tokenises the prompts of one data set."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._name = name

    def encode(self, contents: Sequence[Any], first_row: int) -> pa.RecordBatch:
        """Tokenises prompts.

        Args:
            contents: text or chat messages.
            first_row: the row of the first one, counted from 0, for error messages.

        Returns:
            A row for each, of :data:`~engine.train.data.prompt_table.SCHEMA`. A prompt that
            certainly has more than `data.max_prompt_tokens` tokens is not tokenised. A user message
            made of a text without characters has no tokens, although a template would add some.

        Raises:
            UserInputError: a prompt is neither text nor a conversation, or cannot be rendered.
        """
        found = [self._rendered(c, first_row + i) for i, c in enumerate(contents)]
        ids: list[list[int] | None] = [None] * len(found)
        for plain in (True, False):
            at = [
                i
                for i, (text, messages) in enumerate(found)
                if (messages is None) is plain and not self._is_too_long(text)
            ]
            texts = [found[i][0] for i in at]
            tokens = tokenise_texts(self._tokenizer, texts, special=plain)
            for i, one in zip(at, tokens, strict=True):
                ids[i] = one
        if self._config.chat:
            for i, content in enumerate(contents):
                if isinstance(content, str) and not content.strip():
                    ids[i] = []
        columns = [ids, [text for text, _ in found], [messages for _, messages in found]]
        arrays = [
            pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)
        ]
        return pa.record_batch(arrays, schema=SCHEMA)

    def _rendered(self, content: Any, row: int) -> tuple[str, Messages | None]:
        """Returns the text of a prompt, and its messages if it is a conversation."""
        config = self._config
        if config.chat and isinstance(content, str):
            content = [{"role": "user", "content": content}]
        if isinstance(content, str):
            if config.system is not None:
                raise UserInputError(
                    f"data.system needs conversations, and row {row + 1} of {self._name} is "
                    "text: set data.chat: true to make text a user message"
                )
            return content, None
        messages = _messages(content)
        if messages is None:
            raise UserInputError(
                f"data.prompts: row {row + 1} of {self._name} has neither text nor chat messages "
                f"in column '{config.column}' but {_kind(content)}"
            )
        if not self._tokenizer.chat_template:
            raise UserInputError(
                "data.prompts holds chat messages but the policy's tokenizer has no chat template: "
                "use a chat model or plain text, or give data.chat_template"
            )
        if config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system}, *messages]
        text = render_chat(
            self._tokenizer, messages, "data.prompts", add_generation_prompt=True,
            **config.template_arguments or {},
        )  # fmt: skip
        return text, messages

    def _is_too_long(self, text: str) -> bool:
        """Whether a text certainly has more than `data.max_prompt_tokens` tokens.

        This saves tokenising a prompt that is then left out: a megabyte can take half a minute.
        """
        return len(text) > LONG_TEXT and len(text) > (
            self._config.max_prompt_tokens * self._longest_token
        )

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._tokenizer.get_vocab()))


def _kind(content: Any) -> str:
    """What stands in place of a prompt, in an error: the name of its type, or `null`."""
    return "null" if content is None else type(content).__name__


def tokenise_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool = True
) -> list[list[int]]:
    """Returns the token ids of texts, without a trailing end-of-sequence token.

    Args:
        tokenizer: the policy's.
        texts: the texts.
        special: whether the tokenizer adds its special tokens. Give true for plain text; a rendered
            conversation has them already.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
    )
    found = [list(ids) for ids in encoded["input_ids"]]
    if special:
        end = tokenizer.eos_token_id  # looked up at each access
        for ids in found:
            # Some tokenizers append it to every text, but the response continues the sequence.
            if len(ids) > 1 and ids[-1] == end:
                ids.pop()
    return found


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Lets tokenizers written in Rust use all cores, which a rank's environment forbids."""
    before = os.environ.get(PARALLEL_VARIABLE)
    os.environ[PARALLEL_VARIABLE] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLEL_VARIABLE]
        else:
            os.environ[PARALLEL_VARIABLE] = before


def _messages(content: Any) -> Messages | None:
    """Returns `content` as chat messages, or None if it is not a list of them."""
    if not isinstance(content, list) or not content:
        return None
    for message in content:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return None
    return [{"role": str(m["role"]), "content": str(m["content"])} for m in content]
