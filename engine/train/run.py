"""The state of a run on one rank."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from engine.config.schema import RunConfig
from engine.config.settings import Settings
from engine.examined import examined
from engine.memory.model import Estimate, Models
from engine.progress import Announce, ReportProgress
from engine.protocol.rank_messages import RankTimes
from engine.train.checkpoints.folder import SavedState, TrainingState
from engine.train.checkpoints.saver import SavedModels
from engine.train.data.prompt_order import Prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.environment.environments import Environments
from engine.train.evaluation.held_out import HeldOut
from engine.train.models.language_model import AnyModel, LanguageModel
from engine.train.policy_average import PolicyAverage
from engine.train.rewards.mix import RewardMix
from engine.train.rollout.ahead import RolloutAhead
from engine.train.rollout.backend import OnResponse, RolloutBackend


@dataclass
class PhaseTimes:
    """The seconds that the phases of a step take."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of the current step on this rank, by phase."""
    current: str = ""
    """The current phase, or the last one."""
    ranks: list[RankTimes] = field(default_factory=list)
    """Every rank's times of the last step; set by :meth:`Run.gather_times`."""


@dataclass
class Run:
    """Everything that a training step reads or changes."""

    config: RunConfig
    """Configuration of the next step. Only live settings change, and only between steps."""
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    backend: RolloutBackend
    """Generates responses, or single turns of them."""
    prompts: Prompts
    ranks: RankGroup
    """The ranks of this attempt."""
    strategy: str
    """How the models are distributed over the ranks: `ddp` or `fsdp`."""
    policy: LanguageModel
    learner: nn.Module
    """The policy as wrapped for training: in DDP, or unwrapped."""
    reference: AnyModel
    rewards: RewardMix
    optimiser: torch.optim.Optimizer
    state: TrainingState
    announce: Announce
    """Reports that a phase begins; see :meth:`engine.train.link.Link.phase`."""
    held_out: HeldOut | None
    """Held-out prompts for evaluation; None without `eval.every`."""
    average: PolicyAverage | None
    """The averaged policy; None without `train.ema.decay`."""
    models: Models | None
    """What the memory estimate is based on, measured before loading; None without an estimate."""
    memory: Estimate | None
    """The memory estimate; None if the estimator does not know the model's architecture."""
    ask_early: OnResponse | None = None
    """See :attr:`RewardMix.ask_early`."""
    environments: Environments | None = None
    """Reply to the policy; None if a response is one turn."""
    ahead: RolloutAhead | None = None
    """Generates the next step's responses during a step; None without `rollout.ahead`."""
    settings_after_step: Settings | None = None
    """The settings right after the last step, before any later command; None before this attempt's
    first step."""
    rollout_checked: bool = False
    """Whether :func:`check_first_rollout` has run in this attempt."""
    times: PhaseTimes = field(default_factory=PhaseTimes)

    @contextmanager
    def phase(self, step: int, name: str) -> Iterator[ReportProgress]:
        """Announces and times a phase. Yields a function that reports its progress."""
        seconds = self.times.seconds
        started, self.times.current = time.perf_counter(), name
        yield self.announce(step, name)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # A phase may run several times in a step.
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    def gather_times(self) -> None:
        """Gathers every rank's times and peak memory; a collective."""
        own = RankTimes(
            rank=self.ranks.rank,
            seconds=self.times.seconds,
            peak_memory=peak_memory(self.device),
            on_gpu=self.device.type == "cuda",
        )
        gathered = self.ranks.all_gather_bytes(msgspec.msgpack.encode(own))
        self.times.ranks = [msgspec.msgpack.decode(g, type=examined(RankTimes)) for g in gathered]

    def saved_state(self) -> SavedState:
        """Returns the state, other than tensors, that a checkpoint saved now would hold.

        Its settings are those right after the last step. A command executed between two steps is
        never part of the first step's checkpoint, whether it came before or after the save. The
        journal records it with the second step, where a resume applies it and a rollback discards
        it.
        """
        return SavedState.of(self.state, self.config, self.settings_after_step)

    def saved_models(self) -> SavedModels:
        """Returns what a checkpoint saved now would hold of the models; nothing is copied."""
        return SavedModels(
            self.policy,
            self.tokenizer,
            self.optimiser,
            reference=self.reference if self.state.reference_updated else None,
            average=None if self.average is None else self.average.tensors(self.policy),
        )


def peak_memory(device: torch.device) -> int:
    """Returns this rank's peak memory in bytes: allocated on its GPU, or the resident set size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def max_sequence_tokens(run: Run) -> int | None:
    """Returns the most tokens of prompt plus response that the models accept; None if unlimited.

    Considers the policy, the reference, and a value function with its own transformer.
    """
    models = (run.policy.lm, run.reference.lm, run.policy.value_trunk)
    configs = (getattr(model, "config", None) for model in models)
    found = (getattr(config, "max_position_embeddings", None) for config in configs)
    return min((int(positions) for positions in found if positions is not None), default=None)


def max_response_tokens(run: Run) -> int | None:
    """Returns how many tokens of the policy fit after the longest prompt; None if unlimited.

    An environment's replies take `environment.max_tokens` of them.
    """
    most = max_sequence_tokens(run)
    return None if most is None else most - run.prompts.longest - run.config.reply_tokens
