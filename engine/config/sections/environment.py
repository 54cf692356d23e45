"""The section `environment`: what replies to the policy, so that a response has several turns."""

from typing import Annotated, Literal

from msgspec import Meta

from engine.config.sections.base import Count, PathOrName, Section


class EnvironmentConfig(Section, frozen=True):
    """Responses of several turns: tools, games, simulated users."""

    factory: str | None = None
    """`module:name` of a class or function that makes the environment of one response, whose method
    `reply` answers each turn of the policy. Default: none, so a response is one turn."""
    path: PathOrName | None = None
    """Folder from which the module is imported. Default: the folder of the configuration file."""
    max_turns: Annotated[int, Meta(ge=1, le=1000)] = 8
    """Maximum number of turns of the policy in a response."""
    max_tokens: Count = 512
    """Maximum number of tokens of all replies in a response. A response ends before a reply that
    does not fit."""
    role: Literal["user", "tool"] = "user"
    """Role of a reply in a conversation, for the chat template."""
    concurrency: Annotated[int, Meta(ge=1, le=1024)] = 8
    """How many environments are called at the same time, each in a thread of its own."""
