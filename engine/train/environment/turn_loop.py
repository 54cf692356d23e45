"""Generates responses turn by turn: the policy speaks, environments reply."""

import dataclasses
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from engine.config.schema import RunConfig
from engine.progress import ReportProgress, report_nothing
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.data.randomness import derived_seed
from engine.train.distributed.ranks import RankGroup
from engine.train.environment.environments import Environments
from engine.train.environment.independent_turns import IndependentTurns
from engine.train.environment.reply_tokens import ReplyTokens
from engine.train.environment.response import FinishedResponse, Limits, Response, rollout_of
from engine.train.rollout.backend import SamplingOptions, TurnsBackend
from engine.train.rollout.conversation import SampledTurn
from engine.train.rollout.rollout import Rollout

Generate = Callable[[list[Prompt], SamplingOptions], Rollout]
"""Generates one turn of the policy in response to prompts, on every rank."""


class TurnLoop:
    """The responses to a batch of prompts, which all have an environment.

    :meth:`generate` generates a turn for all responses that go on, as responses to everything
    before it. So it works with every rollout backend; each turn reads what precedes it again.
    :meth:`generate_independently` needs a backend that generates each turn as soon as it can begin.
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
        self._encode = ReplyTokens(config, tokenizer)
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
        going_on = self._add(turn, dict(enumerate(responses)))
        while going_on:
            turn = self._next_turn(going_on, generate)
            going_on = self._add(turn, going_on)
        self._environments.log_failed_calls(self._purpose)
        return rollout_of(
            responses, batch.to(turn.ids.device), self._tokenizer, self._seconds,
            has_tools=bool(self._config.tools),
        )  # fmt: skip

    def generate_independently(
        self, prompts: list[Prompt], backend: TurnsBackend, ranks: RankGroup
    ) -> Rollout:
        """As :meth:`generate`, but responses do not wait for each other.

        Args:
            prompts: the prompts of the batch.
            backend: has the policy's weights.
            ranks: all ranks.
        """
        options, environments = self._options, self._environments
        batch = batch_prompts(prompts, options.per_prompt, self._tokenizer.eos_token_id or 0)
        responses = self._begun(batch.prompts)
        turns, progress = None, (0, len(responses) * options.max_new_tokens)
        if ranks.is_lead:
            turns = IndependentTurns(
                environments, self._encode, self._tokenizer, options, self._purpose, responses
            )

        def report(done: int, total: int) -> None:
            nonlocal progress
            progress = (done, total)
            self._report(done, total)

        def waits() -> None:
            self._report(*progress)

        def run(act: Callable[[ReportProgress], None]) -> None:
            def call(waits: Callable[[], None]) -> None:
                if turns is not None:
                    with turns.calling(waits):
                        act(report)

            environments.on_rank_0(lambda: turns.when if turns else "", call, waits)

        backend.converse(turns, options.temperature, run, report)
        self._share(responses, ranks)
        environments.log_failed_calls(self._purpose)
        seconds = self._seconds + (turns.idle_seconds if turns else 0.0)
        return rollout_of(
            responses, batch.to(ranks.device), self._tokenizer, seconds,
            has_tools=bool(self._config.tools),
        )  # fmt: skip

    @staticmethod
    def _share(responses: list[Response], ranks: RankGroup) -> None:
        """Gives rank 0's finished responses to all ranks; a collective."""
        finished = ranks.broadcast(
            lambda: [FinishedResponse.of(r) for r in responses], list[FinishedResponse]
        )
        if not ranks.is_lead:
            for response, given in zip(responses, finished, strict=True):
                given.copy_to(response)

    def _begun(self, prompts: list[Prompt]) -> list[Response]:
        options, started = self._options, time.perf_counter()
        seeds = [
            derived_seed(options.seed, "environment", options.step, i) for i in range(len(prompts))
        ]
        environments = self._environments.make(prompts, seeds, self._purpose, self._waits)
        self._seconds += time.perf_counter() - started
        limits = Limits(self._config.max_turns, options.max_new_tokens, self._config.max_tokens)
        return [Response(p, e, limits) for p, e in zip(prompts, environments, strict=True)]

    def _next_turn(self, responses: dict[int, Response], generate: Generate) -> Rollout:
        """Generates the next turn of responses, by row, which have had the same number of turns."""
        limits = tuple(response.left for response in responses.values())
        turn = next(iter(responses.values())).turn
        options = dataclasses.replace(
            self._options,
            seed=derived_seed(self._options.seed, "turn", turn),
            per_prompt=1,
            max_new_tokens=max(limits),
            rows=tuple(responses),
            limits=limits,
        )
        self._most = options.max_new_tokens
        return generate([response.next_prompt for response in responses.values()], options)

    def _waits(self) -> None:
        self._report(self._most, self._most)

    def _add(self, turn: Rollout, responses: dict[int, Response]) -> dict[int, Response]:
        """Appends a turn to responses, by row, and the replies; returns the responses that go on.

        An environment hears each turn, also one that was truncated, so that it can give a score.
        """
        host, going_on = turn.cpu(), list(responses.values())
        for i, response in enumerate(going_on):
            response.add_turn(_sampled_turn(host, i), self._tokenizer)
        started = time.perf_counter()
        answers = self._environments.answers(
            [response.environment for response in going_on],
            [response.last_turn for response in going_on],
            self._purpose, going_on[0].turn, self._waits,
            lambda i, messages: going_on[i].reply_ids(messages, self._encode),
        )  # fmt: skip
        self._seconds += time.perf_counter() - started
        return {
            row: response
            for (row, response), answer in zip(responses.items(), answers, strict=True)
            if response.continue_with(answer)
        }


def _sampled_turn(turn: Rollout, row: int) -> SampledTurn:
    """One turn of a rollout on the host."""
    length = int(turn.lengths[row])
    floats = torch.stack([turn.logprobs[row], turn.entropies[row], turn.values[row]])
    version = 0 if turn.versions is None else int(turn.versions[row])
    return SampledTurn(
        row, turn.ids[row, :length].tolist(), floats[:, :length], bool(turn.eos[row]),
        bool(turn.ended[row]), version,
    )  # fmt: skip
