"""Renders chat messages with a model's chat template, which may fail or never end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.errors import UserInputError, first_line
from engine.train.data.prompts import Messages

TIME_LIMIT = 10.0
"""Seconds to render one conversation, which usually takes less than a millisecond."""


class _TimeLimitError(Exception):
    """A template took longer than :data:`TIME_LIMIT`."""


def read_chat_template(value: str) -> str:
    """Returns the Jinja text of `data.chat_template`, which is that text or the name of a file.

    Raises:
        UserInputError: the file cannot be read.
    """
    if "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserInputError(f"data.chat_template: cannot read {value}: {error}") from error


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, key: str, **options: Any
) -> str:
    """Renders a conversation with the tokenizer's chat template.

    transformers runs templates in a sandbox of Jinja: they cannot run Python code, but they can
    loop for hours.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        key: the configuration key that names the tokenizer or the messages, for error messages.
        options: for `apply_chat_template`.

    Raises:
        UserInputError: the template fails on these messages, or takes too long.
    """
    try:
        with _time_limit():
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except MemoryError:
        raise
    except _TimeLimitError:
        raise UserInputError(
            f"{key}: the chat template of {tokenizer.name_or_path} took more than "
            f"{TIME_LIMIT:.0f} s for one conversation; use another model or fix the template"
        ) from None
    except Exception as error:  # a template can raise what any of its expressions raises
        raise UserInputError(
            f"{key}: the chat template of {tokenizer.name_or_path} fails: {first_line(error)}"
        ) from error


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises _TimeLimitError after :data:`TIME_LIMIT`; only works in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise _TimeLimitError

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
