"""Reads the model that the training of a reward model starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from engine import starter
from engine.config.sections.reward import RewardSource
from engine.errors import UserInputError
from engine.protocol.programs.reward_training import RewardTrainingRequest
from engine.train.data.randomness import derived_seed
from engine.train.distributed.ranks import RankGroup
from engine.train.models.adapter_folder import find_adapters
from engine.train.models.cpu_layers import use_cpu_layers
from engine.train.models.mixed_precision import ExpertCasts
from engine.train.models.pretrained import copy_weights, load_tokenizer, reward_options
from engine.train.models.read_pretrained import ReadOptions, read_pretrained
from engine.train.rewards.kinds.model import label_index

LARGE_MODEL = 50_000_000
"""Number of parameters from which the default learning rate is :data:`LARGE_RATE`."""
SMALL_RATE, LARGE_RATE = 1e-4, 1e-5


@dataclass(frozen=True)
class BaseModel:
    """A classifier to be trained, in float32 on the device, and how it is read."""

    name: str
    """As given, a path or a hub id."""
    model: Any
    tokenizer: PreTrainedTokenizerBase
    label: int
    """Index of the logit used as the score."""
    pair: bool
    new_head: bool
    """Whether its head is random because the base was not a classifier."""

    def learning_rate(self, given: float | None) -> float:
        """The given rate, or a default for its size."""
        if given is not None:
            return given
        size = sum(p.numel() for p in self.model.parameters())
        return SMALL_RATE if size < LARGE_MODEL else LARGE_RATE


def read_base(
    request: RewardTrainingRequest, ranks: RankGroup, report: Callable[[str], None]
) -> BaseModel:
    """Reads `request.base`, or the reward model of the first session.

    A model that is not a sequence classifier, such as the policy, gets a new head with one logit.

    Args:
        request: with `base`.
        ranks: a single rank.
        report: called with a line if Python code of the model may run.

    Raises:
        UserInputError: it cannot be read, or the logit to train is unknown.
    """
    settings = request.settings
    source, key = _source(request)
    name = str(source.model)
    path = starter.resolve(name)
    read = reward_options(source)
    if read.trust_remote_code:
        report(f"Python code that comes with {name} may run: trust_remote_code is on")
    label = source.label if settings.label is None else settings.label
    pair = source.pair if settings.pair is None else settings.pair
    torch.manual_seed(derived_seed(settings.seed, "reward head"))  # transformers draws a new head
    tokenizer = load_tokenizer(path, key, ranks, read)
    new_head = not _is_classifier(path, key, read)
    options: dict[str, Any] = {"num_labels": 1, "new_head": True} if new_head else {}
    model = read_pretrained(
        AutoModelForSequenceClassification, path, key, read=read, dtype=torch.float32, **options
    )
    copy_weights(model)
    try:
        index = label_index(name, label, model.config)
    except UserInputError as error:
        raise UserInputError(str(error).replace("reward.label", "--set label")) from None
    model.config.use_cache = False  # a decoder would fill one for nothing
    model = model.to(ranks.device)
    ExpertCasts().apply_to(model)
    use_cpu_layers(model, ranks)
    return BaseModel(name, model, tokenizer, index, pair, new_head)


def _source(request: RewardTrainingRequest) -> tuple[RewardSource, str]:
    """The base as a reward source, and the key or option that names it."""
    if request.base is None:
        (source,) = request.configs[0].reward.models()
        return source, "reward.model"
    settings = request.settings
    return (
        RewardSource(
            model=request.base,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        ),
        "--base",
    )


def _is_classifier(path: str, key: str, read: ReadOptions) -> bool:
    if (adapters := find_adapters(path, key, read.revision)) and adapters.labels() is not None:
        return True
    config = read_pretrained(AutoConfig, path, key, "configuration", read)
    return any("SequenceClassification" in name for name in config.architectures or [])
