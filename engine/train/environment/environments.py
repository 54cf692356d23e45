"""Makes the environments of a step's responses and passes them the policy's turns, on rank 0."""

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from engine.config.schema import RunConfig
from engine.errors import LinkError, UserInputError, shortened
from engine.examined import examined
from engine.train.data.prompts import Messages, Prompt
from engine.train.distributed.compute_on_rank_0 import compute_on_rank_0
from engine.train.distributed.ranks import RankGroup
from engine.train.environment.plain_text import plain_text
from engine.train.environment.tools import ToolAnswers, Tools, ToolUse
from engine.train.rewards.scores import shown
from engine.train.rewards.source import RewardCallError
from engine.train.user_code.concurrent_calls import CallTimeoutError, ConcurrentCalls, call_each
from engine.train.user_code.coroutines import result_of
from engine.train.user_code.errors import SHOWN_MESSAGE, error_line, user_traceback_text
from engine.train.user_code.function import UserFunction

log = logging.getLogger("engine")

T = TypeVar("T")
Reply = str | Messages | None
"""Text, chat messages, or the end of the response."""
RawAnswer = ToolAnswers | Messages | None
"""What follows a turn of the policy, before it is tokenised."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What follows a turn of the policy."""

    messages: Messages | None
    """None: the response ends."""
    ids: list[int] = []
    """The tokens of the messages, and of the chat template around them."""
    tool_calls: int = 0
    """How many the turn had."""
    failed_calls: int = 0
    """How many of them failed."""


class Environments:
    """The environments of the responses that are being generated.

    A user's factory makes one for each response. It is called with those columns of the prompt's
    row that it takes, and with `prompt` (text, or chat messages) and `seed` (an int of the
    response). The environment's method `reply` gets each turn of the policy, the last one included,
    and returns text, chat messages (if the prompt is a conversation), or None to end the response.
    A turn that calls tools is answered with their results instead; the method `called_tools`, if
    there is one, gets both.

    All ranks must call its methods together. The user's code runs on rank 0, which has the rows.
    """

    def __init__(self, config: RunConfig, ranks: RankGroup) -> None:
        """Imports the factory and the tools on rank 0. Raises UserInputError."""
        self._config, self._ranks = config.environment, ranks
        self._name = self._config.factory or ", ".join(self._config.tools)
        sources = (*config.reward.sources(), *config.eval.rewards)
        scores = [source.environment for source in sources if source.environment is not None]
        self._methods = (*([] if self._config.tools else ["reply"]), *scores)
        """Those that an environment must have."""
        self.factory: UserFunction | None = None
        """What makes the environments; None on ranks other than 0, or if there are only tools."""
        self._tools: Tools | None = None
        """None on ranks other than 0, or without tools: `reply` then gets every turn, also one that
        is written like a call."""
        if ranks.is_lead:
            name, path = self._config.factory, self._config.path
            if name is not None:
                self.factory = UserFunction(name, path, "environment.factory")
            if self._config.tools:
                self._tools = Tools(self._config, self.factory.function if self.factory else None)
        self._tool_use = ToolUse()
        """On rank 0, of the responses that are being generated."""

    def tool_schemas(self) -> list[dict[str, Any]]:
        """What the chat template tells the policy about each tool; a collective."""
        schemas = self._tools.schemas if self._tools is not None else []
        data = self._ranks.broadcast_bytes(msgspec.json.encode(schemas))
        return msgspec.json.decode(data, type=examined(list[dict[str, Any]]))

    def make(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        purpose: str,
        waits: Callable[[], None],
    ) -> list[Any]:
        """Makes an environment for each prompt; returns None for each on ranks other than 0.

        Args:
            prompts: n of them.
            seeds: one for each.
            purpose: what the responses are for, such as `step 3`; for errors.
            waits: called regularly, on every rank.

        Raises:
            RewardCallError: the factory raised; on all ranks.
        """
        factory, self._tool_use = self.factory, ToolUse()

        def make(i: int) -> Any:
            if factory is None:
                return None
            prompt = prompts[i]
            text = prompt.text if prompt.messages is None else copy.deepcopy(prompt.messages)
            given = {"seed": seeds[i]} | copy.deepcopy(prompt.row) | {"prompt": text}
            made = result_of(factory.call(given))
            for method in self._methods:
                _check_method(made, method)
            return made

        made: list[Any] = [None] * len(prompts)
        when = f"at {purpose}"

        def run(waits: Callable[[], None]) -> None:
            made[:] = self._each(make, [prompt.text for prompt in prompts], waits, when)

        self.on_rank_0(lambda: when, run, waits)
        return made

    def answers(
        self,
        environments: Sequence[Any],
        turns: Sequence[str],
        purpose: str,
        number: int,
        waits: Callable[[], None],
        tokens: Callable[[int, Messages], list[int]],
    ) -> list[Answer]:
        """Passes a turn to each environment; returns the answers on every rank.

        Args:
            environments: n of them.
            turns: the policy's n texts.
            purpose: what the responses are for, such as `step 3`; for errors.
            number: of the turn, from 1; for errors.
            waits: called regularly, on every rank.
            tokens: called on rank 0 with the index and the messages of each environment that
                replies; returns their tokens, or raises UserInputError if there are none.

        Raises:
            RewardCallError: an environment raised, or returned something else than a reply, or one
                that has no tokens, or did not return in time; on all ranks.
        """
        found: list[Answer] = []
        when = f"at turn {number} of {purpose}"

        def reply(i: int) -> RawAnswer:
            return self.reply(environments[i], turns[i])

        def run(waits: Callable[[], None]) -> None:
            for i, replied in enumerate(self._each(reply, turns, waits, when)):
                try:
                    found.append(self.answer(replied, functools.partial(tokens, i)))
                except UserInputError as error:
                    error.add_note(f"called with {shown(turns[i])}")
                    raise

        self.on_rank_0(lambda: when, run, waits)
        return self._ranks.broadcast(lambda: found, list[Answer])

    def reply(self, environment: Any, turn: str) -> RawAnswer:
        """Passes a turn to one environment, on rank 0; see :meth:`answer`.

        Raises:
            Exception: what the user's code raises, or what :func:`checked_reply` raises.
        """
        if self._tools is not None and (calls := self._tools.calls(turn)):
            answers = self._tools.answers(calls, environment)
            if (called_tools := getattr(environment, "called_tools", None)) is not None:
                result_of(called_tools(turn, [m["content"] for m in answers.messages]))
            return answers
        method = getattr(environment, "reply", None)
        return None if method is None else self._messages(result_of(method(turn)))

    def answer(self, replied: RawAnswer, tokens: Callable[[Messages], list[int]]) -> Answer:
        """Counts what :meth:`reply` returned. One thread at a time may call it.

        Args:
            replied: what :meth:`reply` returned.
            tokens: called with messages; returns their tokens, or raises UserInputError.
        """
        calls, problems = 0, 0
        if isinstance(replied, ToolAnswers):
            self._tool_use.add(replied)
            messages: Messages | None = replied.messages
            calls, problems = len(replied.messages), len(replied.problems)
        else:
            messages = replied
        ids = [] if messages is None else tokens(messages)
        return Answer(messages=messages, ids=ids, tool_calls=calls, failed_calls=problems)

    def _messages(self, value: Any) -> Messages | None:
        """What `reply` returned as messages. Raises what :func:`checked_reply` raises."""
        reply = checked_reply(value)
        return [{"role": self._config.role, "content": reply}] if isinstance(reply, str) else reply

    def log_failed_calls(self, purpose: str) -> None:
        """Logs the first of the tool calls that have failed since :meth:`make`, if any has."""
        if problems := self._tool_use.problems:
            log.warning(
                "%d of %d tool calls of %s failed; the first: %s",
                len(problems), self._tool_use.calls, purpose, " ".join(problems[0].split()),
            )  # fmt: skip

    def _each(
        self, call: Callable[[int], T], texts: Sequence[str], waits: Callable[[], None], when: str
    ) -> list[T]:
        """Calls something for the index of each text; see :func:`call_each`."""
        calls = self.calls(lambda i: texts[i], lambda _i: when)
        return call_each(call, len(texts), waits=waits, calls=calls)

    def calls(self, text: Callable[[int], str], when: Callable[[int], str]) -> ConcurrentCalls:
        """What calls environments by index, within the limits of the configuration.

        Args:
            text: what the environment of an index is called with.
            when: says which call it is, such as `at turn 1 of step 3`.
        """

        def takes_long(i: int, seconds: float) -> None:
            log.warning(
                "environment '%s' %s has not returned for %.0f s (called with %s)",
                self._name, when(i), seconds, shown(text(i)),
            )  # fmt: skip

        return ConcurrentCalls(
            concurrency=self._config.concurrency, limit=self._config.timeout,
            quoted=lambda i: shown(text(i)), takes_long=takes_long,
        )  # fmt: skip

    def on_rank_0(
        self,
        when: Callable[[], str],
        run: Callable[[Callable[[], None]], None],
        waits: Callable[[], None],
    ) -> None:
        """Runs the user's code on rank 0; raises its error on every rank.

        Args:
            when: called after an error, for its text.
            run: called on rank 0 with what it must call regularly.
            waits: called regularly, on every rank.
        """

        def compute(others_wait: Callable[[], None]) -> bytes:
            def waiting() -> None:
                waits()
                others_wait()

            failed = _Failed()
            try:
                with contextlib.ExitStack() as stack:
                    for module in (self.factory, self._tools):
                        if module is not None:
                            stack.enter_context(module.running())
                    run(waiting)
            except LinkError:  # the supervisor is gone
                raise
            # sys.exit() in the user's code must not end the rank silently.
            except (Exception, SystemExit) as error:
                described = self._described(error, when())
                if isinstance(error, CallTimeoutError):
                    failed = _Failed(described, error.stack)
                else:
                    failed = _Failed(described, user_traceback_text(error))
            return msgspec.msgpack.encode(failed)

        data = compute_on_rank_0(self._ranks, compute, waits)
        failed = msgspec.msgpack.decode(data, type=examined(_Failed))
        if failed.text:
            raise RewardCallError(failed.text, failed.trace)

    def _described(self, error: BaseException, when: str) -> str:
        message = str(error) if isinstance(error, CallTimeoutError) else error_line(error)
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", [])[-1:])
        return f"environment '{self._name}' {when}: {message}{notes}"


def _check_method(environment: object, name: str) -> None:
    """Raises TypeError unless an environment has a method."""
    if not callable(getattr(environment, name, None)):
        kind = type(environment).__name__
        raise TypeError(f"it made {kind}, which has no method {name}")


def checked_reply(value: Any) -> Reply:
    """Returns what `reply` of an environment returned, as it may be used.

    Raises:
        TypeError: it is no reply.
        UnicodeError: its text has characters that no text has, such as half of a surrogate pair.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, list) and value:
        texts = [
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in value
        ]
        if all(texts):
            return [{key: plain_text(text) for key, text in message.items()} for message in value]
    raise TypeError(
        f"reply returned {shortened(repr(value), SHOWN_MESSAGE)}, not text, a list of messages "
        "with role and content, or None"
    )


class _Failed(msgspec.Struct, frozen=True):
    """What the user's code raised on rank 0; empty if it did not."""

    text: str = ""
    trace: str = ""
