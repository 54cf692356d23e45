"""Makes the environments of a step's responses and passes them the policy's turns, on rank 0."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from engine.config.sections.environment import EnvironmentConfig
from engine.errors import error_text, shortened, traceback_text
from engine.examined import examined
from engine.train.data.prompts import Prompt
from engine.train.distributed.ranks import RankGroup
from engine.train.rewards.calls import SHOWN_MESSAGE
from engine.train.rewards.scores import shown
from engine.train.rewards.source import RewardCallError
from engine.train.user_function import UserFunction, forks_ended

T = TypeVar("T")
Reply = str | list[dict[str, str]] | None
"""Text, chat messages, or the end of the response."""


class Environments:
    """The environments of the responses that are being generated.

    A user's factory makes one for each response. It is called with those columns of the prompt's
    row that it takes, and with `prompt` (text, or chat messages) and `seed` (an int of the
    response). The environment's method `reply` gets each turn of the policy, the last one included,
    and returns text, chat messages (if the prompt is a conversation), or None to end the response.

    All ranks must call its methods together. The user's code runs on rank 0, which has the rows.
    """

    def __init__(self, config: EnvironmentConfig, ranks: RankGroup) -> None:
        """Imports the factory on rank 0. Raises UserInputError."""
        self._config, self._ranks = config, ranks
        self._name = str(config.factory)
        self._factory: UserFunction | None = None
        if ranks.is_lead:
            self._factory = UserFunction(self._name, config.path, "environment.factory")

    def make(self, prompts: Sequence[Prompt], seeds: Sequence[int], step: int) -> list[Any]:
        """Makes an environment for each prompt; returns None for each on ranks other than 0.

        Raises: RewardCallError: the factory raised; on all ranks.
        """
        factory = self._factory

        def make(i: int) -> Any:
            if factory is None:
                return None
            prompt = prompts[i]
            text = prompt.text if prompt.messages is None else copy.deepcopy(prompt.messages)
            made = factory.call({"seed": seeds[i]} | copy.deepcopy(prompt.row) | {"prompt": text})
            if not callable(getattr(made, "reply", None)):
                raise TypeError(f"it made {type(made).__name__}, which has no method reply")
            return made

        made: list[Any] = [None] * len(prompts)

        def run() -> None:
            made[:] = self._each(make, range(len(prompts)), lambda i: shown(prompts[i].text))

        self._on_rank_0(f"at step {step}", run)
        return made

    def replies(
        self, environments: Sequence[Any], turns: Sequence[str], step: int, number: int
    ) -> list[Reply]:
        """Passes a turn to each environment; returns the replies on every rank.

        Args:
            environments: n of them.
            turns: the policy's n texts.
            step: for errors.
            number: of the turn, from 1; for errors.

        Raises:
            RewardCallError: an environment raised, or returned something else than a reply; on all
                ranks.
        """
        found: list[Reply] = []

        def reply(i: int) -> Reply:
            return checked_reply(environments[i].reply(turns[i]))

        def run() -> None:
            found.extend(self._each(reply, range(len(turns)), lambda i: shown(turns[i])))

        self._on_rank_0(f"at turn {number} of step {step}", run)
        data = self._ranks.broadcast_bytes(msgspec.msgpack.encode(found))
        return msgspec.msgpack.decode(data, type=list[Reply])

    def _each(
        self, call: Callable[[int], T], indices: Sequence[int], quoted: Callable[[int], str]
    ) -> list[T]:
        """Calls something for each index, in threads; raises the first error in their order."""

        def called(i: int) -> T:
            with forks_ended():
                try:
                    return call(i)
                except Exception as error:
                    error.add_note(f"called with {quoted(i)}")
                    raise

        if self._config.concurrency == 1:
            return [called(i) for i in indices]
        with ThreadPoolExecutor(self._config.concurrency, "environment") as pool:
            return list(pool.map(called, indices))

    def _on_rank_0(self, when: str, run: Callable[[], None]) -> None:
        """Runs the user's code on rank 0; raises its error on every rank."""
        failed = _Failed()
        if self._factory is not None:
            try:
                with self._factory.running():
                    run()
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


def checked_reply(value: Any) -> Reply:
    """Returns what `reply` of an environment returned, as it may be used. Raises TypeError."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        texts = [
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in value
        ]
        if all(texts):
            return [dict(message) for message in value]
    raise TypeError(
        f"reply returned {shortened(repr(value), SHOWN_MESSAGE)}, not text, a list of messages "
        "with role and content, or None"
    )


class _Failed(msgspec.Struct, frozen=True):
    """What the user's code raised on rank 0; empty if it did not."""

    text: str = ""
    trace: str = ""
