"""Generates responses turn by turn: the policy speaks, environments reply."""

import dataclasses
import time
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from engine.config.schema import RunConfig
from engine.progress import ReportProgress, report_nothing
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.data.randomness import derived_seed
from engine.train.environment.environments import Answer, Environments, Messages
from engine.train.environment.reply_tokens import ReplyTokens
from engine.train.environment.response import Response, rollout_of
from engine.train.rollout.backend import SamplingOptions
from engine.train.rollout.rollout import Rollout

Generate = Callable[[list[Prompt], SamplingOptions], Rollout]
"""Generates one turn of the policy in response to prompts, on every rank."""


class TurnLoop:
    """The responses to a batch of prompts, which all have an environment.

    Each turn generates text for all responses that go on, as responses to everything before it. So
    it works with every rollout backend; each turn reads what precedes it again.
    """

    def __init__(
        self,
        config: RunConfig,
        environments: Environments,
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        purpose: str,
        report: ReportProgress = report_nothing,
    ) -> None:
        """Stores the arguments.

        Args:
            config: the run's.
            environments: make and call the user's objects.
            tokenizer: the policy's.
            options: of the whole responses. `max_new_tokens` limits the tokens of the policy in all
                turns together.
            purpose: what the responses are for, such as `step 3`; for errors.
            report: called with (tokens, tokens) of a turn while environments reply, so that a rank
                that waits for them is not silent.
        """
        self._report = report
        self._config = config.environment
        self._environments = environments
        self._tokens = ReplyTokens(config, tokenizer)
        self._tokenizer = tokenizer
        self._options = options
        self._purpose = purpose
        self._seconds = 0.0
        self._most = options.max_new_tokens
        """The most tokens of the present turn."""

    def generate(self, prompts: list[Prompt], generate: Generate) -> Rollout:
        """Generates whole responses; all ranks must call it.

        Raises:
            RewardCallError: an environment raised, or the chat template cannot render its reply.
        """
        batch = batch_prompts(prompts, self._options.per_prompt, self._tokenizer.eos_token_id or 0)
        turn = generate(prompts, self._options)
        responses = self._begun(batch.prompts)
        going_on = dict(enumerate(responses))
        for number in range(1, self._config.max_turns + 1):
            if number > 1:
                turn = self._next_turn(going_on, number, generate)
            going_on = self._add(turn, going_on, number)
            if not going_on:
                break
        self._environments.log_failed_calls(self._purpose)
        return rollout_of(
            responses, batch.to(turn.ids.device), self._tokenizer, self._seconds,
            has_tools=bool(self._config.tools),
        )  # fmt: skip

    def _begun(self, prompts: list[Prompt]) -> list[Response]:
        options, started = self._options, time.perf_counter()
        seeds = [
            derived_seed(options.seed, "environment", options.step, i) for i in range(len(prompts))
        ]
        environments = self._environments.make(prompts, seeds, self._purpose, self._waits)
        self._seconds += time.perf_counter() - started
        return [Response(p, e) for p, e in zip(prompts, environments, strict=True)]

    def _next_turn(
        self, responses: dict[int, Response], number: int, generate: Generate
    ) -> Rollout:
        """Generates the next turn of responses, by row."""
        limits = tuple(self._left(response) for response in responses.values())
        options = dataclasses.replace(
            self._options,
            seed=derived_seed(self._options.seed, "turn", number),
            per_prompt=1,
            max_new_tokens=max(limits),
            rows=tuple(responses),
            limits=limits,
        )
        self._most = options.max_new_tokens
        return generate([response.next_prompt for response in responses.values()], options)

    def _waits(self) -> None:
        self._report(self._most, self._most)

    def _left(self, response: Response) -> int:
        """How many tokens the policy may still sample in a response."""
        return self._options.max_new_tokens - len(response.positions)

    def _add(
        self, turn: Rollout, responses: dict[int, Response], number: int
    ) -> dict[int, Response]:
        """Appends a turn to responses, by row, and the replies; returns the responses that go on.

        An environment hears each turn, also one that was truncated, so that it can give a score.
        """
        host = turn.cpu()
        texts = [
            response.add_turn(host, i, self._tokenizer)
            for i, response in enumerate(responses.values())
        ]
        going_on, last = list(responses.values()), number == self._config.max_turns
        started = time.perf_counter()

        def tokens(i: int, messages: Messages) -> list[int]:
            response = going_on[i]
            if last or not response.ended or not self._left(response):
                return []  # the reply is not used
            return self._tokens(response.prompt, messages, response.ids[-1])

        answers = self._environments.answers(
            [response.environment for response in going_on], texts, self._purpose, number,
            self._waits, tokens,
        )  # fmt: skip
        self._seconds += time.perf_counter() - started
        return {
            row: response
            for (row, response), answer in zip(responses.items(), answers, strict=True)
            if self._goes_on(response, answer, last=last)
        }

    def _goes_on(self, response: Response, answer: Answer, *, last: bool) -> bool:
        """Appends a reply unless the response ends here; `last` is at the limit of turns."""
        response.tool_calls += answer.tool_calls
        response.failed_calls += answer.failed_calls
        if answer.messages is None or not response.ended:
            return False
        fits = response.reply_tokens + len(answer.ids) <= self._config.max_tokens
        if last or not fits or not self._left(response):
            response.ended = False  # the environment would have gone on
            response.reply_left_out = not fits
            return False
        response.add_reply(answer.ids, answer.messages)
        return True
