"""Rollout backends: their interface, the table of backends, and generation across ranks.

To add a backend, write a module with a class that implements :class:`RolloutBackend` and list it in
:data:`BACKENDS`. Once per attempt, a backend's log-probabilities are compared with a full forward
pass of the policy (:mod:`engine.train.experience.rollout_check`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.progress import ReportProgress, report_nothing
from engine.train.data.prompts import Prompt, PromptBatch, batch_prompts
from engine.train.data.randomness import sampling_uniforms
from engine.train.distributed.ranks import RankGroup
from engine.train.models.language_model import AnyModel
from engine.train.rollout.context import BackendContext
from engine.train.rollout.conversation import RunOnRank0, TurnSource
from engine.train.rollout.native.backend import NativeBackend
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.rollout import OnEnded, Rollout, merge_rollouts, response_text
from engine.train.rollout.vllm.backend import VllmBackend


class RolloutBackend(Protocol):
    """Generates responses with a model's current weights."""

    @property
    def separate(self) -> bool:
        """Whether it generates in another program, with a copy of the weights.

        Its log-probabilities then differ from the model's by more than rounding, and are never used
        as log π_old.
        """

    def sync(self, model: AnyModel, weights_version: int, report: ReportProgress) -> None:
        """Makes :meth:`generate` use the model's current weights.

        All ranks must call it at the same point. Does nothing if the backend already has this
        version.

        Args:
            model: the policy or the reference.
            weights_version: the step whose update produced the policy's current weights.
            report: call it regularly with (done, total).
        """

    def generate(
        self,
        model: AnyModel,
        request: RolloutRequest,
        report: ReportProgress,
        on_ended: OnEnded | None,
    ) -> Rollout:
        """Generates a response to each prompt, with log-probabilities at the temperature.

        All ranks must call it at the same point, each with its own prompts.

        Args:
            model: in evaluation mode; its weights may have changed since the last call.
            request: the prompts, and what determines the responses to them.
            report: call it regularly with (tokens done, T).
            on_ended: may be called with responses that have ended while others have not. A row
                beyond this rank's is one of the next ranks'.
        """


class PendingRollout(Protocol):
    """Responses being generated in the background."""

    def result(self, report: ReportProgress) -> Rollout:
        """Waits for this rank's responses; all ranks must call it at the same point.

        Args:
            report: call it regularly with (done, total) while waiting.
        """


@runtime_checkable
class BackgroundBackend(RolloutBackend, Protocol):
    """A backend that can generate while the policy is updated, for `rollout.ahead`."""

    def begin(self, request: RolloutRequest) -> PendingRollout:
        """Starts generating with the policy's weights of the last :meth:`sync`.

        All ranks must call it at the same point. Any other use of the backend first waits until
        these responses are complete, and loses none of them.
        """


@runtime_checkable
class TurnsBackend(RolloutBackend, Protocol):
    """A backend that can generate each turn as soon as it can begin.

    For `environment.turns: independent`.
    """

    def converse(
        self, turns: TurnSource | None, temperature: float, run: RunOnRank0, report: ReportProgress
    ) -> None:
        """Generates turns with the policy's weights of the last :meth:`sync`, until none is left.

        All ranks must call it at the same point.

        Args:
            turns: on rank 0, where they come from and go to.
            temperature: > 0.
            run: calls what calls the methods of `turns`.
            report: called regularly with (tokens done, total).
        """


OnResponse = Callable[[Prompt, str], None]
"""Called with a prompt and the text of a response that has ended."""

MakeBackend = Callable[[BackendContext], RolloutBackend]

BACKENDS: dict[str, MakeBackend] = {
    "native": NativeBackend.of,
    "vllm": VllmBackend,
}
"""Backends by name."""


GREEDY_TEMPERATURE = 1e-6
"""Gives the most likely token probability 1 in float32, unless logits differ by less than 1e-4."""


@dataclass(frozen=True)
class SamplingOptions:
    """Everything that, besides model and prompts, determines the sampled tokens."""

    seed: int
    step: int
    temperature: float
    max_new_tokens: int
    weights_version: int
    """The step whose update produced the policy's current weights; unique for any other weights."""
    per_prompt: int = 1
    """Responses to each prompt, in adjacent rows."""
    rows: tuple[int, ...] | None = None
    """Which rows of the step's batch these are, for their random numbers. Default: the first."""
    limits: tuple[int, ...] | None = None
    """Maximum number of new tokens of each row. Default: `max_new_tokens` for all."""


@dataclass(frozen=True)
class Share:
    """The part of a batch that one rank generates."""

    batch: PromptBatch
    """All B prompts."""
    rows: Tensor
    """This rank's rows of the batch, (n,) int64: all responses to a contiguous part of the
    prompts."""
    counts: bool
    """False if there are fewer prompts than ranks and this rank generates rows of another one, as
    every rank must generate something."""
    uniforms: Tensor
    """(n, T) float64, of these rows."""
    options: SamplingOptions
    tokenizer: PreTrainedTokenizerBase
    ranks: RankGroup
    """The ranks that share the work."""

    @property
    def request(self) -> RolloutRequest:
        """What this rank generates."""
        options, limits = self.options, self.options.limits
        return RolloutRequest(
            self.batch.select(self.rows), self.uniforms, options.temperature, options.per_prompt,
            None if limits is None else torch.tensor(limits)[self.rows],
        )  # fmt: skip

    def on_ended(self, on_response: OnResponse) -> OnEnded:
        """Returns a callback for the backend, which counts responses from this rank's first one."""
        first = int(self.rows[0])

        def ended(row: int, ids: list[int]) -> None:
            if self.counts:
                on_response(self.batch.prompts[first + row], response_text(ids, self.tokenizer))

        return ended

    def merged(self, local: Rollout) -> Rollout:
        """Merges all ranks' parts into the rollout of the whole batch; a collective.

        Args:
            local: this rank's n responses.
        """
        if local.versions is None:
            local.versions = torch.full_like(local.lengths, self.options.weights_version)
        rows = self.rows
        if not self.counts:
            rows = torch.arange(0)
            local = local.select(rows)
        return merge_rollouts(
            self.ranks, self.batch, local, rows, self.options.max_new_tokens, self.tokenizer
        )


def share_of(
    prompts: list[Prompt],
    options: SamplingOptions,
    tokenizer: PreTrainedTokenizerBase,
    ranks: RankGroup,
) -> Share:
    """Selects what this rank generates of a batch; see :func:`generate_responses`."""
    per_prompt = options.per_prompt
    batch = batch_prompts(prompts, per_prompt, tokenizer.eos_token_id or 0)
    own = ranks.contiguous_share(len(prompts))
    generated = own or range(1)
    rows = torch.arange(generated.start * per_prompt, generated.stop * per_prompt)
    numbers = torch.tensor(options.rows or range(len(batch.prompts)))
    uniforms = sampling_uniforms(
        options.seed, options.step, int(numbers.max()) + 1, options.max_new_tokens
    )
    return Share(batch, rows, bool(own), uniforms[numbers[rows]], options, tokenizer, ranks)


def generate_responses(
    backend: RolloutBackend,
    model: AnyModel,
    prompts: list[Prompt],
    options: SamplingOptions,
    tokenizer: PreTrainedTokenizerBase,
    ranks: RankGroup,
    report: ReportProgress = report_nothing,
    *,
    on_ended: OnResponse | None = None,
) -> Rollout:
    """Generates responses to prompts; the rollout holds all of them, on every rank.

    Args:
        backend: the run's.
        model: the policy or the reference, in evaluation mode.
        prompts: the prompts of the whole batch, the same on every rank.
        options: seed, step, temperature and lengths.
        tokenizer: the policy's.
        ranks: the ranks that share the work. Each generates for a contiguous part of the prompts.
        report: called with (tokens done, total).
        on_ended: may be called with responses that have ended while others have not.
    """
    share = share_of(prompts, options, tokenizer, ranks)
    backend.sync(model, options.weights_version, report)
    local = backend.generate(
        model, share.request, report, None if on_ended is None else share.on_ended(on_ended)
    )
    return share.merged(local)
