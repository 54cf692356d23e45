"""A value function that starts from the run's reward model (`ppo.value_init: reward_model`)."""

import torch
from torch import nn

from engine import starter
from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.train.distributed.broadcast_files import without_weights
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.stored_tensor import held_values
from engine.train.models.language_model import LanguageModel
from engine.train.models.pretrained import (
    load_tokenizer,
    policy_options,
    reward_options,
)
from engine.train.rewards.kinds.model import label_index, load_classifier, score_layer
from engine.train.rewards.mix import RewardMix
from engine.train.rewards.normalise import Normaliser


def load_value_model(
    config: RunConfig, ranks: RankGroup, strategy: str
) -> tuple[nn.Module, nn.Linear]:
    """Loads the reward model's transformer and a head that computes its score; float32.

    As in Stiennon et al. 2020 (arXiv 2009.01325) and Huang et al. 2024: the reward of a whole
    response is a better first estimate of its value than 0. All ranks must call it.

    Returns:
        The trunk and the head. On ranks other than 0 both are on the meta device; the trunk may be
        so on rank 0 too, until it is placed.

    Raises:
        UserInputError: the reward model does not read the policy's tokens, or has no linear layer
            on a decoder that gives its score.
    """
    (source,) = config.reward.models()
    path = starter.resolve(str(source.model))
    read, policy = reward_options(source), starter.resolve(config.model.policy)
    vocabularies = [
        load_tokenizer(p, key, ranks, options).get_vocab()
        for p, key, options in (
            (path, "reward.model", read),
            (policy, "model.policy", policy_options(config, policy)),
        )
    ]
    if vocabularies[0] != vocabularies[1]:
        raise UserInputError(
            f"ppo.value_init: '{source.model}' does not read the policy's tokens: the value "
            "function must; with zero it begins with a new head"
        )
    model = load_classifier(path, ranks, strategy, torch.float32, read)
    scorer = score_layer(model, "ppo.value_init")
    with without_weights(ranks):
        head = nn.Linear(scorer.in_features, 1)
        if ranks.is_lead:
            label = label_index(str(source.model), source.label, model.config)
            with torch.no_grad():
                head.weight.copy_(held_values(scorer.weight)[label : label + 1])
                head.bias.zero_()
                if scorer.bias is not None:
                    head.bias.copy_(held_values(scorer.bias)[label : label + 1])
    return model.base_model, head


@torch.no_grad()
def scale_value_head(policy: LanguageModel, rewards: RewardMix, total: Normaliser) -> None:
    """Rescales the head so that it predicts the reward model's share of the training scores.

    Call it once, before the first step.

    Args:
        policy: with the head of :func:`load_value_model`.
        rewards: the reward model's weight, and its own normalisation if it has one.
        total: the normalisation of the sum of all sources.
    """
    head = policy.value_head
    if head is None:
        raise TypeError("the policy has no value function")
    factor, offset = _scale(rewards, total)
    head.weight.mul_(factor)
    head.bias.mul_(factor).add_(offset)


def first_weights(rewards: RewardMix, total: Normaliser) -> list[float]:
    """The weights of the last layer's states that give the score, and a bias.

    `model.value: reward_model` begins with them. All ranks must call it.

    Args:
        rewards: with one reward model.
        total: the normalisation of the sum of all sources.
    """
    factor, offset = _scale(rewards, total)
    *weights, bias = rewards.reward_model().score_weights()
    return [*(factor * w for w in weights), factor * bias + offset]


def _scale(rewards: RewardMix, total: Normaliser) -> tuple[float, float]:
    """Returns the factor and offset that turn a reward model's logit into a score."""
    weight, (mean, std) = rewards.model_scale()
    factor = weight / std / total.std
    return factor, -(factor * mean + total.mean / total.std)
