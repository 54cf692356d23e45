"""Tools: functions of the user's that the policy calls in its turns."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from engine.config.sections.environment import EnvironmentConfig
from engine.errors import UserInputError, encodable, error_text, first_line, shortened
from engine.train.data.prompts import Messages
from engine.train.environment.plain_text import plain_text
from engine.train.environment.tool_calls import ToolCall, find_calls
from engine.train.user_code.coroutines import result_of
from engine.train.user_code.function import UserFunction

MAX_ERROR = 500
"""Most characters of an error that the policy reads."""


@dataclass(frozen=True)
class ToolAnswers:
    """The results of the calls of a turn."""

    messages: Messages
    """One for each call, with the role `tool`."""
    problems: list[str]
    """What went wrong, with the tool's name if it was given: one for each call that failed."""


@dataclass
class ToolUse:
    """Counts the calls of some responses."""

    calls: int = 0
    problems: list[str] = field(default_factory=list)
    """What went wrong, in the order of the calls."""

    def add(self, answers: ToolAnswers) -> None:
        """Counts the calls of a turn."""
        self.calls += len(answers.messages)
        self.problems += answers.problems


class ToolCallError(Exception):
    """The policy wrote a call that cannot be run."""


class Tools:
    """The tools of a run.

    A tool is a function of a module, or a method of the response's environment. What goes wrong in
    a call is told to the policy as its result, since the call may be the reason.
    """

    def __init__(self, config: EnvironmentConfig, factory: Any) -> None:
        """Imports the functions and makes their schemas.

        Args:
            config: names the tools.
            factory: of the environments, whose methods can be tools; None without one.

        Raises:
            UserInputError: a function cannot be imported, or has no docstring or type hints that
                say what it takes.
        """
        self._pattern = re.compile(config.call_pattern) if config.call_pattern else None
        self._modules: list[UserFunction] = []
        self._functions: dict[str, Callable[..., Any] | None] = {}
        """By name; None for a method of the environment."""
        self.schemas: list[dict[str, Any]] = []
        """What the chat template tells the policy about each tool."""
        for i, source in enumerate(config.tools):
            self._add(source, config.path, factory, f"environment.tools[{i}]")

    def _add(self, source: str, path: str | None, factory: Any, key: str) -> None:
        described: Any
        called: Callable[..., Any] | None = None
        if ":" in source:
            module = UserFunction(source, path, key)
            self._modules.append(module)
            described = called = module.function
        else:
            described = getattr(factory, source, None)
            if not callable(described):
                raise UserInputError(f"{key}: environment.factory has no method {source}")
        try:
            schema = get_json_schema(described)
        except Exception as error:  # what a docstring or a hint can be is for transformers to say
            raise UserInputError(
                f"{key}: {first_line(error)} (a tool needs type hints, and a docstring that "
                "describes it and each argument under Args:)"
            ) from error
        name = schema["function"]["name"]
        if name in self._functions:
            raise UserInputError(f"{key}: there is another tool with the name {name}")
        self._functions[name] = called
        self.schemas.append(schema)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager in which the functions run; see :meth:`UserFunction.running`."""
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(module.running())
            yield

    def calls(self, text: str) -> list[ToolCall]:
        """Finds the calls in a turn of the policy; none if the turn is an answer."""
        return find_calls(text, self._pattern, self.schemas)

    def answers(self, calls: Sequence[ToolCall], environment: Any) -> ToolAnswers:
        """Runs calls, one after the other."""
        results, problems = [], []
        for call in calls:
            try:
                results.append(self._result(call, environment))
            # The policy may be the reason, also of an exit() in code that it wrote: it is told.
            except (Exception, SystemExit) as error:
                text = error_text(error)
                if not isinstance(error, ToolCallError):
                    text = f"{type(error).__name__}: {text}"
                text = shortened(text, MAX_ERROR)
                problems.append(f"{call.name}: {text}" if call.name else text)
                results.append(f"error: {text}")
        messages = [
            {"role": "tool", "name": encodable(call.name), "content": encodable(result)}
            for call, result in zip(calls, results, strict=True)
        ]
        return ToolAnswers(messages, [encodable(problem) for problem in problems])

    def _result(self, call: ToolCall, environment: Any) -> str:
        if call.problem:
            raise ToolCallError(call.problem)
        if call.name not in self._functions:
            known = ", ".join(self._functions)
            raise ToolCallError(f"there is no tool '{call.name}'; the tools are {known}")
        function = self._functions[call.name] or getattr(environment, call.name)
        result = result_of(function(**(call.arguments or {})))
        if not isinstance(result, str):
            result = json.dumps(result, ensure_ascii=False, default=str)
        return plain_text(result)
