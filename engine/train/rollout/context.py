"""The parts of a run that rollout backends are built from."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from engine.config.schema import RunConfig
from engine.progress import Announce
from engine.train.distributed.ranks import RankGroup
from engine.train.models.language_model import LanguageModel
from engine.train.rollout.stop_criteria import StopCriteria


@dataclass(frozen=True)
class BackendContext:
    """The parts of a run that backends use."""

    config: RunConfig
    """The configuration at the start of the attempt."""
    stop_criteria: StopCriteria
    tokenizer: PreTrainedTokenizerBase
    """The policy's."""
    policy: LanguageModel
    ranks: RankGroup
    longest: int
    """Tokens of the longest context: a prompt and the replies of an environment."""
    announce: Announce
