"""The state of a run on one rank."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engine.config.schema import RunConfig
from engine.config.settings import Settings
from engine.examined import examined
from engine.memory.model import Estimate
from engine.progress import ReportProgress
from engine.protocol.rank_messages import RankTimes
from engine.train.checkpoints.folder import SavedState, TrainingState
from engine.train.data.prompt_order import Prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.evaluation.held_out import HeldOut
from engine.train.models.language_model import AnyModel, LanguageModel
from engine.train.policy_average import PolicyAverage
from engine.train.ppo.metrics import peak_memory
from engine.train.rewards.mix import RewardMix
from engine.train.rewards.normalise import Normaliser
from engine.train.rollout.ahead import RolloutAhead
from engine.train.rollout.backend import RolloutBackend
from engine.train.rollout.rollout import Rollout


class PhaseTimer:
    """Measures the seconds that each phase of a step takes on this rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By phase, of the current step."""
        self.current = ""
        """The phase that runs, or ran last."""
        self.ranks: list[RankTimes] = []
        """Every rank's times of the last step; set by :meth:`gather`."""

    @contextmanager
    def phase(self, run: "Run", step: int, name: str) -> Iterator[ReportProgress]:
        """Reports that a phase begins and times it. Yields a function that reports its progress."""
        started, self.current = time.perf_counter(), name
        yield run.announce(step, name)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        # A phase may have several parts in a step.
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def gather(self, run: "Run") -> None:
        """Gathers every rank's times and peak memory into :attr:`ranks`; a collective."""
        times = RankTimes(
            rank=run.ranks.rank, seconds=self.seconds, peak_memory=peak_memory(run.device)
        )
        gathered = run.ranks.all_gather_bytes(msgspec.msgpack.encode(times))
        self.ranks = [msgspec.msgpack.decode(g, type=examined(RankTimes)) for g in gathered]


Announce = Callable[..., ReportProgress]
"""Called with a step, a phase's name and, where known, (done, total)."""


@dataclass
class Run:
    """Everything that a step reads or changes."""

    config: RunConfig
    """In force for the next step. Live settings change at step boundaries; the rest never does."""
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    backend: RolloutBackend
    """Generates responses."""
    prompts: Prompts
    ranks: RankGroup
    """The ranks of this attempt."""
    strategy: str
    """How the models are placed on the ranks: `ddp` or `fsdp`."""
    policy: LanguageModel
    learner: nn.Module
    """The policy as wrapped for training: in DDP, or the policy itself."""
    reference: AnyModel
    rewards: RewardMix
    optimiser: torch.optim.Optimizer
    state: TrainingState
    announce: Announce
    """Reports that a phase begins; see :meth:`engine.train.link.Link.phase`."""
    held_out: HeldOut | None
    """For evaluations; None without `eval.every`."""
    average: PolicyAverage | None
    """The averaged policy; None without `train.ema.decay`."""
    memory: Estimate | None
    """The memory estimate; None if the model's shapes are unknown to the estimator."""
    ahead: RolloutAhead | None = None
    """Generates the next step's responses beside a step; None without `rollout.ahead`."""
    settings_after_step: Settings | None = None
    """The settings after the last step, before the commands that followed it; None if this attempt
    has no step yet."""
    rollout_checked: bool = False
    """Whether :func:`check_first_rollout` has run in this attempt."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def saved_state(self) -> SavedState:
        """The state that a checkpoint of this moment holds, apart from tensors.

        Its settings are those after the last step. A command between two steps is never in the
        checkpoint of the first one, whether it came before the save or after it: the journal has
        it at the second one, where a resume applies it, and where a roll back discards it.
        """
        return SavedState.of(self.state, self.config, self.settings_after_step)


def scores_for_training(run: Run, raw: Tensor, rollout: Rollout, max_new_tokens: int) -> Tensor:
    """Normalises and clips the raw scores of a rollout, and subtracts penalties.

    Args:
        run: with the scale of the scores.
        raw: (B,) float32.
        rollout: the B responses.
        max_new_tokens: of them.

    Returns:
        (B,) float32 on the device.
    """
    normalise = Normaliser(run.state.reward_mean, run.state.reward_std)
    return normalise(
        raw.to(run.device), run.config.reward, rollout.ended, rollout.lengths, max_new_tokens
    )


def max_sequence_tokens(run: Run) -> int | None:
    """Tokens of a prompt and its response that the models can read; None if they have no limit.

    These are the policy, the reference, and a value function with a transformer of its own.
    """
    models = (run.policy.lm, run.reference.lm, run.policy.value_trunk)
    configs = (getattr(model, "config", None) for model in models)
    found = (getattr(config, "max_position_embeddings", None) for config in configs)
    return min((int(positions) for positions in found if positions is not None), default=None)


def max_response_tokens(run: Run) -> int | None:
    """New tokens that fit after the longest prompt; None if the models have no limit."""
    most = max_sequence_tokens(run)
    return None if most is None else most - run.prompts.longest
