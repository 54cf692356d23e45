"""Generation of a step's responses beside the step before (`rollout.ahead: 1`).

While the policy is updated, the engine generates the responses of the next step with the weights
from before that update. So they are one version old when they are trained on, which
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
    """The responses that are generated for a later step."""

    options: SamplingOptions
    share: Share
    pending: PendingRollout


class RolloutAhead:
    """The rollout of the next step, while it is generated, and that of the step that trains on it.

    All ranks call its methods together. It is state of an attempt that no checkpoint holds: what
    follows a checkpoint is generated anew, in the run that saved it, too.
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
        """Of the step that trains on it, in case it is repeated: the weights that sampled it are
        no longer there."""

    def take(self, options: SamplingOptions, report: ReportProgress) -> Rollout | None:
        """The rollout of a step, if it was generated ahead as that step samples; waits for it.

        A setting may have changed since: then the responses are dropped, because those of the step
        must be sampled with the settings that the journal has for it.

        Args:
            options: those of the step; their version of the weights does not count.
            report: called with (tokens done, total).

        Returns:
            The rollout, the same if a step is repeated; None if it must be generated now.
        """
        if self._taken is not None:
            taken, rollout = self._taken
            if _alike(taken, options):
                return rollout
            self._taken = None
        ahead = self._next
        if ahead is None or ahead.options.step != options.step:
            return None
        self._next = None
        if not _alike(ahead.options, options):
            return None
        local = ahead.pending.result(report)
        rollout = ahead.share.merged(
            local, ahead.options.weights_version, self._tokenizer, self._ranks
        )
        self._taken = options, rollout
        return rollout

    def begin(
        self, prompts: list[Prompt], options: SamplingOptions, report: ReportProgress
    ) -> None:
        """Begins to generate the rollout of the next step, with the policy's present weights.

        Does nothing if that has begun, as when a step is repeated.

        Args:
            prompts: those of the next step, the same on every rank.
            options: those of the next step, with the version of the policy's present weights.
            report: called with the progress of sending the weights.
        """
        if self._next is not None and self._next.options == options:
            return
        self._backend.sync(self._policy, options.weights_version, report)
        share = share_of(prompts, options, self._tokenizer, self._ranks)
        pending = self._backend.begin(share.prompts, share.uniforms, options.temperature)
        self._next = _Next(options, share, pending)

    def drop(self) -> None:
        """Drops the responses of the next step, which are then generated anew."""
        self._next = self._taken = None


def _alike(one: SamplingOptions, other: SamplingOptions) -> bool:
    """Whether two samplings differ by the weights alone."""
    return dataclasses.replace(one, weights_version=other.weights_version) == other


def rollout_ahead(
    config: RunConfig,
    backend: RolloutBackend,
    policy: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    ranks: RankGroup,
) -> RolloutAhead | None:
    """What generates ahead in a run; None without `rollout.ahead`.

    Raises:
        UserInputError: the backend cannot do that.
    """
    if not config.rollout.ahead:
        return None
    if not isinstance(backend, BackgroundBackend):
        raise UserInputError(f"rollout.ahead: {config.rollout.engine} cannot generate ahead")
    return RolloutAhead(backend, policy, tokenizer, ranks)
