"""Reports several mistakes of a configuration in one error message."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from engine.errors import MAX_CONFIG_ERROR, ConfigError

MAX_LISTED = 4
"""Maximum number of mistakes that a message lists after the first one, if there is room."""

OTHERS_PREFIX = " (also"
"""Begins what a message adds about other mistakes, and a closing bracket ends it."""


def raise_mistakes(mistakes: Iterable[str]) -> None:
    """Raises one ConfigError for all mistakes; does nothing if there is none."""
    if found := list(mistakes):
        raise ConfigError(joined_mistakes(found))


def joined_mistakes(mistakes: list[str]) -> str:
    """Joins mistakes into one message: the whole first one, and others while there is room.

    The message has at most :data:`~engine.errors.MAX_CONFIG_ERROR` characters if the first mistake
    has.
    """
    first, *others = mistakes
    listed: list[str] = []
    for text in others[:MAX_LISTED]:
        if len(_joined(first, [*listed, text, "and others"])) <= MAX_CONFIG_ERROR:
            listed.append(text)
    return _joined(first, [*listed, *(["and others"] if len(listed) < len(others) else [])])


def _joined(first: str, others: list[str]) -> str:
    if not others:
        return first
    listed = "; ".join(others)
    if OTHERS_PREFIX in first:
        return f"{first[:-1]}; {listed})"
    return f"{first}{OTHERS_PREFIX}: {listed})"


def mistakes_of(check: Callable[..., Any], *values: Any) -> Iterator[str]:
    """The message of the ConfigError that a function raises for these values, if it raises one."""
    try:
        check(*values)
    except ConfigError as error:
        yield str(error)
