"""Everything a step works with."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from engine.config.schema import RunConfig
from engine.memory.model import Estimate
from engine.protocol.rank_messages import RankTimes
from engine.train.checkpoints.folder import SavedState, TrainingState
from engine.train.data.prompts import Prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.models.language_model import AnyModel, LanguageModel
from engine.train.ppo.metrics import peak_memory
from engine.train.rewards.mix import RewardMix
from engine.train.rollout.backend import RolloutBackend
from engine.train.rollout.rollout import ReportProgress


class PhaseTimer:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.ranks: list[RankTimes] = []
        """Every rank's, once a step is done."""

    @contextmanager
    def phase(self, run: "Run", step: int, name: str) -> Iterator[ReportProgress]:
        """Announces the phase, times it, and hands out its progress report."""
        began = time.perf_counter()
        yield run.announce(step, name)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        self.seconds[name] = time.perf_counter() - began

    def gather(self, run: "Run") -> None:
        """Sets :attr:`ranks`, on every rank, to what this step took each of them so far."""
        own = RankTimes(
            rank=run.ranks.rank, seconds=self.seconds, peak_memory=peak_memory(run.device)
        )
        gathered = run.ranks.all_gather_bytes(msgspec.msgpack.encode(own))
        self.ranks = [msgspec.msgpack.decode(g, type=RankTimes) for g in gathered]


Announce = Callable[..., ReportProgress]
"""Takes a step, a phase's name and, where known, what is done of how much."""


@dataclass
class Run:
    """Everything a step works with."""

    config: RunConfig
    """In force for the next step; only its live settings change, at step boundaries."""
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    backend: RolloutBackend
    """Generates responses."""
    prompts: Prompts
    ranks: RankGroup
    """The ranks of this attempt."""
    strategy: str
    """`ddp` or `fsdp`: how the models lie on them."""
    policy: LanguageModel
    learner: nn.Module
    """The policy as the epochs enter it."""
    reference: AnyModel
    rewards: RewardMix
    optimiser: torch.optim.Optimizer
    state: TrainingState
    announce: Announce
    """Tells of a phase, by step and name; the result takes its progress."""
    memory: Estimate | None
    """What it was estimated to hold; None where its models cannot be planned with."""
    checked: bool = False
    """Whether this attempt's first rollout was held against a full forward pass."""
    clock: PhaseTimer = field(default_factory=PhaseTimer)

    def saved_state(self) -> SavedState:
        """What a checkpoint made now holds besides the weights."""
        return SavedState.of(self.state, self.config)


def max_response_tokens(run: Run) -> int | None:
    """New tokens that fit behind the longest prompt; None where the model has no last position."""
    positions = getattr(run.policy.lm.config, "max_position_embeddings", None)
    return None if positions is None else int(positions) - run.prompts.longest
