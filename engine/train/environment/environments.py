"""Makes the environments of a step's responses and passes them the policy's turns, on rank 0."""

import contextlib
import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from engine.config.schema import RunConfig
from engine.errors import LinkError, UserInputError, error_text, shortened, traceback_text
from engine.examined import examined
from engine.train.data.prompts import Prompt
from engine.train.distributed.ranks import RankGroup
from engine.train.environment.plain_text import plain_text
from engine.train.environment.tools import ToolAnswers, Tools, ToolUse
from engine.train.rewards.calls import SHOWN_MESSAGE
from engine.train.rewards.scores import shown
from engine.train.rewards.source import RewardCallError
from engine.train.user_function import UserFunction, forks_ended

log = logging.getLogger("engine")

LONG_CALL = 60.0
"""Seconds after which the log tells of a call that has not returned."""

T = TypeVar("T")
Reply = str | list[dict[str, str]] | None
"""Text, chat messages, or the end of the response."""


class Environments:
    """The environments of the responses that are being generated.

    A user's factory makes one for each response. It is called with those columns of the prompt's
    row that it takes, and with `prompt` (text, or chat messages) and `seed` (an int of the
    response). The environment's method `reply` gets each turn of the policy, the last one included,
    and returns text, chat messages (if the prompt is a conversation), or None to end the response.
    A turn that calls tools is answered with their results instead.

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
        step: int,
        made_one: Callable[[], None],
    ) -> list[Any]:
        """Makes an environment for each prompt; returns None for each on ranks other than 0.

        Args:
            prompts: n of them.
            seeds: one for each.
            step: for errors.
            made_one: called on rank 0 after each environment.

        Raises: RewardCallError: the factory raised; on all ranks.
        """
        factory, self._tool_use = self.factory, ToolUse()

        def make(i: int) -> Any:
            if factory is None:
                return None
            prompt = prompts[i]
            text = prompt.text if prompt.messages is None else copy.deepcopy(prompt.messages)
            made = factory.call({"seed": seeds[i]} | copy.deepcopy(prompt.row) | {"prompt": text})
            for method in self._methods:
                _check_method(made, method)
            return made

        made: list[Any] = [None] * len(prompts)
        when = f"at step {step}"

        def run() -> None:
            made[:] = self._each(
                make, range(len(prompts)), lambda i: shown(prompts[i].text), made_one, when
            )

        self._on_rank_0(when, run)
        return made

    def replies(
        self,
        environments: Sequence[Any],
        turns: Sequence[str],
        step: int,
        number: int,
        replied: Callable[[], None],
        check: Callable[[int, Reply], object],
    ) -> list[Reply]:
        """Passes a turn to each environment; returns the replies on every rank.

        Args:
            environments: n of them.
            turns: the policy's n texts.
            step: for errors.
            number: of the turn, from 1; for errors.
            replied: called on rank 0 after each reply.
            check: called on rank 0 with the index and the reply of each environment; raises
                UserInputError if the reply cannot be used.

        Raises:
            RewardCallError: an environment raised, or returned something else than a reply, or one
                that cannot be used; on all ranks.
        """
        found: list[Reply] = []
        when = f"at turn {number} of step {step}"

        def reply(i: int) -> Reply | ToolAnswers:
            if self._tools is not None and (calls := self._tools.calls(turns[i])):
                return self._tools.answers(calls, environments[i])
            method = getattr(environments[i], "reply", None)
            return None if method is None else checked_reply(method(turns[i]))

        def run() -> None:
            replies = self._each(reply, range(len(turns)), lambda i: shown(turns[i]), replied, when)
            for reply_or_answers in replies:
                if isinstance(reply_or_answers, ToolAnswers):
                    self._tool_use.add(reply_or_answers)
                    found.append(reply_or_answers.messages)
                else:
                    found.append(reply_or_answers)
            for i, one in enumerate(found):
                try:
                    check(i, one)
                except UserInputError as error:
                    error.add_note(f"called with {shown(turns[i])}")
                    raise

        self._on_rank_0(when, run)
        data = self._ranks.broadcast_bytes(msgspec.msgpack.encode(found))
        return msgspec.msgpack.decode(data, type=examined(list[Reply]))

    def take_tool_use(self, step: int) -> ToolUse | None:
        """Returns the use of tools since :meth:`make`; logs the first problem.

        Returns: None without tools; counts nothing on ranks other than 0.
        """
        if not self._config.tools:
            return None
        if problems := self._tool_use.problems:
            log.warning(
                "%d of %d tool calls of step %d failed; the first: %s",
                len(problems), self._tool_use.calls, step, " ".join(problems[0].split()),
            )  # fmt: skip
        return self._tool_use

    def _each(
        self,
        call: Callable[[int], T],
        indices: Sequence[int],
        quoted: Callable[[int], str],
        called_one: Callable[[], None],
        when: str,
    ) -> list[T]:
        """Calls something for each index, in threads; raises the first error in their order.

        Calls `called_one` after each, in this thread. Logs the first call that takes long.
        """
        results: list[T] = []
        told = threading.Lock()

        def tell(i: int) -> None:
            if told.acquire(blocking=False):
                log.warning(
                    "environment '%s' %s takes more than %.0f s (called with %s)",
                    self._name, when, LONG_CALL, quoted(i),
                )  # fmt: skip

        def called(i: int) -> T:
            timer = threading.Timer(LONG_CALL, tell, (i,))
            timer.daemon = True
            timer.start()
            with forks_ended():
                try:
                    return call(i)
                except Exception as error:
                    error.add_note(f"called with {quoted(i)}")
                    raise
                finally:
                    timer.cancel()

        with contextlib.ExitStack() as stack:
            calls: Iterator[T]
            if self._config.concurrency == 1:
                calls = map(called, indices)
            else:
                pool = ThreadPoolExecutor(self._config.concurrency, "environment")
                calls = stack.enter_context(pool).map(called, indices)
            for result in calls:
                results.append(result)
                called_one()
        return results

    def _on_rank_0(self, when: str, run: Callable[[], None]) -> None:
        """Runs the user's code on rank 0; raises its error on every rank."""
        failed = _Failed()
        if self._ranks.is_lead:
            try:
                with contextlib.ExitStack() as stack:
                    for module in (self.factory, self._tools):
                        if module is not None:
                            stack.enter_context(module.running())
                    run()
            except LinkError:  # the supervisor is gone
                raise
            # sys.exit() in the user's code must not end the rank silently.
            except (Exception, SystemExit) as error:
                failed = _Failed(self._described(error, when), traceback_text(error))
        data = self._ranks.broadcast_bytes(msgspec.msgpack.encode(failed))
        failed = msgspec.msgpack.decode(data, type=examined(_Failed))
        if failed.text:
            raise RewardCallError(failed.text, failed.trace)

    def _described(self, error: BaseException, when: str) -> str:
        message = shortened(" ".join(error_text(error).split()), SHOWN_MESSAGE)
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", [])[-1:])
        return f"environment '{self._name}' {when}: {type(error).__name__}: {message}{notes}"


def _check_method(environment: object, name: str) -> None:
    """Raises TypeError unless an environment has a method that can be called in a thread."""
    kind = type(environment).__name__
    if inspect.iscoroutine(environment):
        environment.close()  # otherwise Python warns that it was never awaited
    method = getattr(environment, name, None)
    if not callable(method):
        raise TypeError(f"it made {kind}, which has no method {name}")
    if inspect.iscoroutinefunction(method):
        raise TypeError(f"{kind}.{name} must not be async: it is called in a thread of its own")


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
