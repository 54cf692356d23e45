"""Generates a step's responses during the previous step (`rollout.ahead: 1`).

While the policy is updated, the engine generates the next step's responses with the weights from
before that update. So the responses are one version old when they are trained on, which
`ppo.rollout_correction` corrects for.
"""

import dataclasses
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.progress import ReportProgress
from engine.train.data.prompts import Prompt
from engine.train.distributed.ranks import RankGroup
from engine.train.models.language_model import AnyModel
from engine.train.rollout.backend import (
    BackgroundBackend,
    PendingRollout,
    RolloutBackend,
    SamplingOptions,
    Share,
    share_of,
)
from engine.train.rollout.rollout import Rollout


@dataclass(frozen=True)
class _Next:
    """The responses being generated for a later step."""

    share: Share
    pending: PendingRollout


class RolloutAhead:
    """Holds the next step's rollout while it is generated, and the rollout of the current step.

    All ranks must call its methods together. This state is not part of a checkpoint: responses
    after a checkpoint are generated anew, also in the run that saved it.
    """

    def __init__(
        self,
        backend: BackgroundBackend,
        policy: AnyModel,
        tokenizer: PreTrainedTokenizerBase,
        ranks: RankGroup,
    ) -> None:
        """Stores the arguments; generates nothing yet."""
        self._backend = backend
        self._policy = policy
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._next: _Next | None = None
        self._taken: tuple[SamplingOptions, Rollout] | None = None
        """Rollout of the current step, kept in case the step is repeated: the weights that sampled
        it no longer exist."""

    def take(self, options: SamplingOptions, report: ReportProgress) -> Rollout | None:
        """Waits for and returns a step's rollout, if it was generated ahead with the same options.

        If a setting has changed since, the responses are dropped: a step's responses must be
        sampled with the settings that the journal records for it.

        Args:
            options: the step's sampling options; the weights version is not compared.
            report: called with (tokens done, total).

        Returns:
            The rollout (the same one if the step is repeated), or None if it must be generated now.
        """
        if self._taken is not None:
            taken, rollout = self._taken
            if _alike(taken, options):
                return rollout
            self._taken = None
        ahead = self._next
        if ahead is None or ahead.share.options.step != options.step:
            return None
        self._next = None
        if not _alike(ahead.share.options, options):
            return None
        rollout = ahead.share.merged(ahead.pending.result(report))
        self._taken = options, rollout
        return rollout

    def begin(
        self, prompts: list[Prompt], options: SamplingOptions, report: ReportProgress
    ) -> None:
        """Starts generating the next step's rollout with the policy's current weights.

        Does nothing if it has already started, for example when a step is repeated.

        Args:
            prompts: the next step's prompts, the same on every rank.
            options: the next step's sampling options, with the version of the policy's current
                weights.
            report: called with the progress of sending the weights.
        """
        if self._next is not None and self._next.share.options == options:
            return
        self._backend.sync(self._policy, options.weights_version, report)
        share = share_of(prompts, options, self._tokenizer, self._ranks)
        self._next = _Next(share, self._backend.begin(share.request))

    def drop(self) -> None:
        """Drops the next step's responses, so that they are generated anew."""
        self._next = self._taken = None


def _alike(one: SamplingOptions, other: SamplingOptions) -> bool:
    """Whether two sampling options differ at most in the weights version."""
    return dataclasses.replace(one, weights_version=other.weights_version) == other


def rollout_ahead(
    config: RunConfig,
    backend: RolloutBackend,
    policy: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    ranks: RankGroup,
) -> RolloutAhead | None:
    """Creates a run's :class:`RolloutAhead`; None without `rollout.ahead`.

    Raises:
        UserInputError: the backend cannot generate in the background.
    """
    if not config.rollout.ahead:
        return None
    if not isinstance(backend, BackgroundBackend):
        raise UserInputError(f"rollout.ahead: {config.rollout.engine} cannot generate ahead")
    return RolloutAhead(backend, policy, tokenizer, ranks)
