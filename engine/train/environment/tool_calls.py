"""Finds the tool calls in a turn of the policy."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import encodable, shortened

CALL = ("<tool_call>", "</tool_call>")
"""How Qwen, SmolLM3, Hermes, Nemotron and others enclose a call."""
THOUGHT = ("<think>", "</think>")
"""How these and others enclose what the policy thinks before it says something."""
FUNCTION = re.compile(r"(?s)<function=([^>]*)>(.*?)(?:</function>|$)")
PARAMETER = re.compile(r"(?s)<parameter=([^>]*)>\n?(.*?)\n?</parameter>")
"""How Qwen 3.5 and Nemotron 3 write a call; older models write `{"name": …, "arguments": …}`."""
ARGUMENTS = ("arguments", "parameters")
"""The key that holds the arguments; Llama writes the latter."""
MAX_NAME = 200
"""Most characters of the name of a tool."""
MAX_PROBLEM = 500
"""Most characters of what is wrong with a call."""


@dataclass(frozen=True)
class ToolCall:
    """A call in a turn of the policy."""

    name: str = ""
    arguments: dict[str, Any] | None = None
    problem: str = ""
    """Why it cannot be run, if it is not even written correctly."""


def find_calls(
    text: str, pattern: re.Pattern[str] | None, schemas: Sequence[dict[str, Any]]
) -> list[ToolCall]:
    """Finds the calls in a turn of the policy; none if the turn is an answer.

    A call that the policy only thinks about is none.

    Args:
        text: the turn, with its special tokens.
        pattern: whose group is a call; default: what :data:`CALL` encloses.
        schemas: of the tools, for the types of their parameters.
    """
    said = text.rpartition(THOUGHT[1])[2].partition(THOUGHT[0])[0]
    if pattern is None:
        found = enclosed(said)
    else:
        found = [match.group(1) or "" for match in pattern.finditer(said)]
    return [_parsed(call.strip(), schemas) for call in found]


def _parsed(text: str, schemas: Sequence[dict[str, Any]]) -> ToolCall:
    """Reads a call in one of the two notations."""
    if (written := FUNCTION.match(text)) is None:
        return _parsed_json(text)
    name, found = shortened(written.group(1), MAX_NAME), PARAMETER.findall(written.group(2))
    types = {
        key: kind.get("type")
        for schema in schemas
        if schema["function"]["name"] == name
        for key, kind in schema["function"]["parameters"]["properties"].items()
    }
    return ToolCall(name, {key: _typed(value, types.get(key)) for key, value in found})


def enclosed(text: str) -> list[str]:
    """The texts that :data:`CALL` encloses.

    Takes time in proportion to the text. A regular expression does not: it looks for the end of
    each call that is never closed, and holds the rank meanwhile.
    """
    begin, end = CALL
    parts = text.split(end)[:-1]
    return [part.partition(begin)[2] for part in parts if begin in part]


def _typed(text: str, kind: Any) -> Any:
    """A parameter's value as its type in the schema says; text stays as it is."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _parsed_json(text: str) -> ToolCall:
    """Reads a call that is written in JSON."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ToolCall(problem=f"the call is not JSON: {shortened(str(error), MAX_PROBLEM)}")
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str):
        return ToolCall(problem="the call is no object with a name and arguments")
    name = shortened(encodable(name), MAX_NAME)
    given = [call[key] for key in ARGUMENTS if key in call]
    arguments = given[0] if given else {}
    if not isinstance(arguments, dict):
        return ToolCall(name, problem="the arguments are no object")
    return ToolCall(name, arguments)
