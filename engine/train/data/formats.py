"""Finds the prompt in a row, in the data set formats that TRL's trainers read.

Source: TRL's documentation, "Dataset formats and types" (standard and conversational; prompt-only,
prompt-completion, preference with an explicit or an implicit prompt, language modelling).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import UserInputError, shortened

PROMPT, CHOSEN, REJECTED, MESSAGES = "prompt", "chosen", "rejected", "messages"
MAX_SHOWN = 400
"""Characters of the names of columns in an error message."""


class PromptColumn:
    """Finds the prompts of a data set's rows."""

    def __init__(self, column: str, available: Sequence[str], name: str) -> None:
        """Chooses the columns that are read.

        Args:
            column: `data.column`. If it is `prompt` and there is no such column, the prompt comes
                from the columns of preference data (`chosen` and `rejected`) or of conversations
                (`messages`).
            available: the columns of the data set.
            name: the name of the data set, for error messages.

        Raises:
            UserInputError: there is no such column.
        """
        self.columns = [column]
        """The columns that :meth:`contents` needs."""
        self._extract: Callable[..., Any] = lambda content: content
        if column in available:
            return
        if column == PROMPT and {CHOSEN, REJECTED} <= set(available):
            self.columns, self._extract = [CHOSEN, REJECTED], common_start
        elif column == PROMPT and MESSAGES in available:
            self.columns, self._extract = [MESSAGES], before_reply
        else:
            listed = ", ".join(c if c.isprintable() else repr(c) for c in available)
            raise UserInputError(
                f"data.column: no column '{column}' in {name}; it has "
                f"{shortened(listed, MAX_SHOWN)}"
            )

    def contents(self, rows: Sequence[dict[str, Any]]) -> list[Any]:
        """Returns the prompt of each row: text, chat messages, or any other value found there."""
        return [self._extract(*(row[column] for column in self.columns)) for row in rows]


def common_start(chosen: Any, rejected: Any) -> Any:
    """Returns the prompt that two completions begin with: their common text or common messages.

    A space at the end of the common text belongs to the completions, because tokens begin with it.
    If one completion is text and the other has messages, there is no prompt, and an error names the
    row.
    """
    if not isinstance(chosen, str | list) or type(chosen) is not type(rejected):
        return None
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1],
                                              zip(chosen, rejected, strict=False)))  # fmt: skip
    if isinstance(chosen, list):
        return before_reply(chosen[:same])
    return chosen[:same].removesuffix(" ")


def before_reply(messages: Any) -> Any:
    """Returns a conversation without its trailing assistant messages."""
    if not isinstance(messages, list):
        return messages
    end = len(messages)
    while (
        end and isinstance(messages[end - 1], dict) and messages[end - 1].get("role") == "assistant"
    ):
        end -= 1
    return messages[:end]
