"""Responses that take their next turn as soon as their environment has replied."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

from transformers import PreTrainedTokenizerBase

from engine.protocol.rollout.messages import NextTurn
from engine.train.data.randomness import derived_seed, sample_uniforms
from engine.train.environment.environments import Environments
from engine.train.environment.reply_calls import ReplyCalls
from engine.train.environment.reply_tokens import ReplyTokens
from engine.train.environment.response import Response
from engine.train.environment.turn_queue import TurnQueue
from engine.train.rollout.backend import SamplingOptions
from engine.train.rollout.conversation import SampledTurn


class IndependentTurns:
    """The responses of a batch on rank 0; a :class:`TurnSource` of a backend.

    Engines take turns from a queue. Each one that they have generated is passed to the environment,
    whose reply puts the next one into the queue.
    """

    def __init__(
        self,
        environments: Environments,
        encode: ReplyTokens,
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        purpose: str,
        responses: list[Response],
    ) -> None:
        """Makes the first turn of each response ready; the arguments are :class:`TurnLoop`'s."""
        self._environments, self._encode, self._tokenizer = environments, encode, tokenizer
        self._options, self._purpose, self._responses = options, purpose, responses
        self._queue = TurnQueue([self._next(row) for row in range(len(responses))])
        self._calls: ReplyCalls | None = None
        self._waits: Callable[[], None] = lambda: None
        self._engine_lives = False
        """Whether an engine has asked for turns since :meth:`meanwhile`."""
        self.lock = self._queue.lock
        self.count, self.tokens = len(responses), options.max_new_tokens
        self.longest = max(
            len(r.prompt.ids) + r.limits.reply_tokens + r.limits.tokens for r in responses
        )

    @property
    def idle_seconds(self) -> float:
        """How long nothing was generated because all environments were being waited for."""
        return self._queue.idle_seconds

    @property
    def when(self) -> str:
        """The turn that failed; for errors."""
        return self._when(self._calls.failed_row if self._calls is not None else 0)

    def _when(self, row: int) -> str:
        return f"at turn {self._responses[row].turn} of {self._purpose}"

    def _next(self, row: int) -> NextTurn:
        """The turn that a response takes next, with the random numbers of its row and turn."""
        options, response = self._options, self._responses[row]
        if response.turn == 1:
            seed, sample = options.seed, options.rows[row] if options.rows else row
        else:
            seed, sample = derived_seed(options.seed, "turn", response.turn), row
        uniforms = sample_uniforms(seed, options.step, sample, response.left)
        return NextTurn(row, response.prompt.ids + response.ids, uniforms.numpy().tobytes())

    # -- the backend's side --------------------------------------------------------------------

    def take(self, rows: range, at_most: int, *, wait: bool) -> list[NextTurn] | None:
        """See :class:`TurnSource`."""
        self._engine_lives = True
        return self._queue.take(rows, at_most, wait=wait)

    def release(self, rows: range, taken: Collection[int]) -> None:
        """Lets every engine take turns of responses whose engine is gone."""
        self._queue.release(rows, taken)

    def add(self, turn: SampledTurn) -> None:
        """See :class:`TurnSource`."""
        self._queue.remove(turn.row)
        self._responses[turn.row].add_turn(turn, self._tokenizer)
        if self._calls is not None:
            self._calls.submit(turn.row, self._reply)

    def meanwhile(self) -> None:
        """See :class:`TurnSource`."""
        if self._calls is None:
            return
        self._calls.check()
        if self._calls.any_left or self._engine_lives:  # otherwise an engine may hang
            self._engine_lives = False
            self._waits()

    # -- environments --------------------------------------------------------------------------

    @contextmanager
    def calling(self, waits: Callable[[], None]) -> Iterator[None]:
        """Context in which environments are called; waits for these calls at its end.

        Args:
            waits: called regularly while there are calls or an engine generates, by
                :meth:`meanwhile`.

        Raises:
            CallTimeoutError: a call exceeds the limit.
            Exception: the first error of a call. A call that exceeds the limit is not waited for.
        """
        calls = self._environments.calls(lambda row: self._responses[row].last_turn, self._when)
        self._calls = ReplyCalls(calls, partial(self._queue.end, range(self.count)))
        self._waits = waits
        try:
            yield
            self._calls.wait(self.meanwhile)
        finally:
            self._calls.close()
        if self._calls.error is not None:
            raise self._calls.error

    def _reply(self, row: int) -> None:
        """Passes a turn to the environment, in a thread; makes the next turn ready."""
        response = self._responses[row]
        replied = self._environments.reply(response.environment, response.last_turn)
        with self.lock:
            answer = self._environments.answer(
                replied, lambda messages: response.reply_ids(messages, self._encode)
            )
            if response.continue_with(answer):
                self._queue.put(self._next(row))
            else:
                self._queue.end([row])
