"""Responses that take their next turn as soon as their environment has replied."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from engine.config.sections.environment import EnvironmentConfig
from engine.protocol.rollout.messages import NextTurn
from engine.train.data.prompts import Messages
from engine.train.data.randomness import derived_seed, sample_uniforms
from engine.train.environment.environments import Environments
from engine.train.environment.reply_tokens import ReplyTokens
from engine.train.environment.response import Response
from engine.train.rollout.backend import SamplingOptions
from engine.train.rollout.conversation import SampledTurn
from engine.train.user_code.concurrent_calls import (
    CHECK_INTERVAL,
    CallTimeoutError,
    ConcurrentCalls,
)


class IndependentTurns:
    """The responses of a batch on rank 0; a :class:`TurnSource` of a backend.

    A turn is *ready* until the backend takes it, *taken* until the backend adds what it has
    generated, and then passed to the environment, whose reply makes the next one ready.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        environments: Environments,
        tokens: ReplyTokens,
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        purpose: str,
        responses: list[Response],
    ) -> None:
        """Makes the first turn of each response ready; the arguments are :class:`TurnLoop`'s."""
        self.lock = threading.RLock()
        self.count = len(responses)
        self.tokens = options.max_new_tokens
        self.longest = max(len(r.prompt.ids) for r in responses) + config.max_tokens + self.tokens
        self.seconds = 0.0
        """How long nothing was generated because all environments were being waited for."""
        self._config, self._environments, self._reply_tokens = config, environments, tokens
        self._tokenizer, self._options, self._purpose = tokenizer, options, purpose
        self._responses = responses
        self._changed = threading.Condition(self.lock)
        self._turns = [1] * self.count
        """The number of each response's present turn."""
        self._texts = [response.prompt.text for response in responses]
        """What each environment is called with."""
        self._open = set(range(self.count))
        """Responses that go on."""
        self._ready = {row: self._next(row) for row in range(self.count)}
        self._taken: dict[int, NextTurn] = {}
        self._released: set[int] = set()
        """Responses whose engine is gone, or has been replaced: any engine may take their turns."""
        self._idle_since: float | None = None
        self._calls: ConcurrentCalls | None = None
        self._futures: set[Future[None]] = set()
        self._waits: Callable[[], None] = lambda: None
        self._engine_lives = False
        """Whether an engine has taken turns, or asked for some, since :meth:`meanwhile`."""
        self._overdue = False
        """Whether a call has exceeded the limit, so that calls are no longer waited for."""
        self._error: BaseException | None = None
        self._failed_row = 0

    @property
    def when(self) -> str:
        """The turn that failed; for errors."""
        return self._when(self._failed_row)

    def _when(self, row: int) -> str:
        return f"at turn {self._turns[row]} of {self._purpose}"

    def _next(self, row: int) -> NextTurn:
        """The turn that a response takes next, with the random numbers of its row and turn."""
        options, response, number = self._options, self._responses[row], self._turns[row]
        limit = response.left(self.tokens)
        if number == 1:
            seed, sample = options.seed, options.rows[row] if options.rows else row
        else:
            seed, sample = derived_seed(options.seed, "turn", number), row
        uniforms = sample_uniforms(seed, options.step, sample, limit)
        return NextTurn(row, response.prompt.ids + response.ids, uniforms.numpy().tobytes())

    # -- the backend's side --------------------------------------------------------------------

    def take(self, rows: range, at_most: int, *, wait: bool) -> list[NextTurn] | None:
        """See :class:`TurnSource`."""
        with self.lock:
            self._engine_lives = True
            while self._error is None:
                others = sorted(self._released.difference(rows))
                if not any(row in self._open for row in (*rows, *others)):
                    break
                ready = [row for row in (*rows, *others) if row in self._ready][:at_most]
                if not ready and wait:
                    self._changed.wait()
                    continue
                turns = [self._ready.pop(row) for row in ready]
                self._taken.update((turn.row, turn) for turn in turns)
                if turns:
                    self._count_idle_time()
                return turns
            return None

    def release(self, rows: range, taken: Collection[int]) -> None:
        """See :class:`TurnSource`."""
        with self.lock:
            self._ready |= {row: self._taken.pop(row) for row in taken}
            self._released.update(rows)
            self._changed.notify_all()

    def add(self, turn: SampledTurn) -> None:
        """See :class:`TurnSource`."""
        with self.lock:
            del self._taken[turn.row]
            if not self._taken:
                self._idle_since = time.perf_counter()
            row, calls = turn.row, self._calls
            self._texts[row] = self._responses[row].add_turn(turn, self._tokenizer)
            if self._error is None and calls is not None:
                future = calls.submit(row, self._reply)
                self._futures.add(future)
                future.add_done_callback(lambda f: self._replied(row, f))

    def meanwhile(self) -> None:
        """See :class:`TurnSource`."""
        if self._calls is None:
            return
        try:
            self._calls.check()
        except CallTimeoutError as error:
            self._overdue = True
            self._fail(error.index, error)  # unless another call has raised before
        if self._futures or self._engine_lives:  # otherwise an engine may hang
            self._engine_lives = False
            self._waits()

    def _count_idle_time(self) -> None:
        if self._idle_since is not None:
            self.seconds += time.perf_counter() - self._idle_since
            self._idle_since = None

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
        self._calls = self._environments.calls(self._texts.__getitem__, self._when)
        self._waits = waits
        try:
            yield
            while (futures := self._futures.copy()) and not self._overdue:
                wait(futures, CHECK_INTERVAL)
                self.meanwhile()
        finally:
            self._calls.close()
            self._calls = None
        with self.lock:
            self._count_idle_time()
        if self._error is not None:
            raise self._error

    def _reply(self, row: int) -> None:
        """Passes a turn to the environment, in a thread; makes the next turn ready."""
        response = self._responses[row]
        replied = self._environments.reply(response.environment, self._texts[row])
        with self.lock:
            last = self._turns[row] == self._config.max_turns

            def tokens(messages: Messages) -> list[int]:
                if not response.uses_reply(self.tokens, last=last):
                    return []
                return self._reply_tokens(response.prompt, messages, response.ids[-1])

            answer = self._environments.answer(replied, tokens)
            if response.goes_on(answer, self.tokens, self._config.max_tokens, last=last):
                self._turns[row] += 1
                self._ready[row] = self._next(row)
            else:
                self._open.remove(row)
            self._changed.notify_all()

    def _replied(self, row: int, future: Future[None]) -> None:
        """Called when a call has ended, or will not begin."""
        if not future.cancelled() and (error := future.exception()) is not None:
            self._fail(row, error)
        self._futures.discard(future)

    def _fail(self, row: int, error: BaseException) -> None:
        """Ends all responses because of the first error."""
        with self.lock:
            if self._error is None:
                self._error, self._failed_row = error, row
            self._changed.notify_all()
        for future in self._futures.copy():
            future.cancel()
