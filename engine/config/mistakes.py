"""Tells several mistakes of a configuration in one message."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from engine.errors import MAX_CONFIG_ERROR, ConfigError

LISTED = 4
"""How many mistakes a message lists after the first one, if there is room for them."""

ALSO = " (also"
"""Begins what a message adds about other mistakes, and a closing bracket ends it."""


def raise_mistakes(mistakes: Iterable[str]) -> None:
    """Raises ConfigError if there is a mistake; its message tells all of them."""
    if told := list(mistakes):
        raise ConfigError(together(told))


def together(mistakes: list[str]) -> str:
    """One message: the first mistake whole, and of the others those for which there is room."""
    first, *others = mistakes
    listed: list[str] = []
    for text in others[:LISTED]:
        if len(_joined(first, [*listed, text, "and others"])) <= MAX_CONFIG_ERROR:
            listed.append(text)
    return _joined(first, [*listed, *(["and others"] if len(listed) < len(others) else [])])


def _joined(first: str, others: list[str]) -> str:
    if not others:
        return first
    listed = "; ".join(others)
    return f"{first[:-1]}; {listed})" if ALSO in first else f"{first}{ALSO}: {listed})"


def mistakes_of(check: Callable[..., Any], *values: Any) -> Iterator[str]:
    """The message of the ConfigError that a function raises for these values, if it raises one."""
    try:
        check(*values)
    except ConfigError as error:
        yield str(error)
