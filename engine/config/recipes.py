"""The settings of the recipes in examples/, for `rlhf-tui init`.

They are written for the starter models; :func:`for_real_models` changes what depends on the size.
"""

import copy
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """A way to train."""

    title: str
    settings: dict[str, dict[str, Any]]
    """By section and key, without the models and the data."""


SMALL = {"batch_size": 64, "max_new_tokens": 32}
TRAIN = {"steps": 60, "learning_rate": 1e-4}
RECIPES = {
    "ppo": Recipe(
        "PPO with a value function and an adaptive KL coefficient",
        {
            "rollout": SMALL,
            "ppo": {"advantage": "gae", "epochs": 2, "minibatches": 2, "micro_batch_size": 32},
            "kl": {"controller": "adaptive", "beta": 0.15, "target": 5.0, "horizon": 400},
            "train": {"steps": 240, "learning_rate": 1e-4, "save_every": 25},
        },
    ),
    "lora": Recipe(
        "PPO that trains adapters (LoRA); the model itself is frozen and is the reference",
        {
            "lora": {"rank": 16},
            "rollout": SMALL,
            "ppo": {"epochs": 2, "minibatches": 2, "micro_batch_size": 32},
            "kl": {"controller": "adaptive", "target": 5.0, "horizon": 400},
            "train": {"steps": 60, "learning_rate": 1e-3},
        },
    ),
    "rloo": Recipe(
        "RLOO: several responses to a prompt in place of a value function",
        {
            "rollout": {"batch_size": 64, "per_prompt": 4, "max_new_tokens": 32},
            "ppo": {"advantage": "rloo", "epochs": 2, "minibatches": 2, "micro_batch_size": 32},
            "train": TRAIN,
        },
    ),
    "grpo": Recipe(
        "GRPO: advantages within groups, KL in the loss (Shao et al. 2024)",
        {
            "rollout": {"batch_size": 64, "per_prompt": 8, "max_new_tokens": 32},
            "ppo": {
                "advantage": "grpo", "scale_rewards": "group", "loss_aggregation": "sequence",
                "epochs": 1, "minibatches": 1, "micro_batch_size": 32, "clip_range": 0.2,
            },
            "kl": {"estimator": "k3", "place": "loss", "beta": 0.04},
            "train": TRAIN,
        },
    ),
    "dr-grpo": Recipe(
        "Dr. GRPO: GRPO without its biases of length and difficulty (Liu et al. 2025)",
        {
            "rollout": {"batch_size": 64, "per_prompt": 8, "max_new_tokens": 32},
            "ppo": {
                "advantage": "grpo", "scale_rewards": "none",
                "loss_aggregation": "sequence_sum_constant",
                "epochs": 1, "minibatches": 2, "micro_batch_size": 32, "clip_range": 0.2,
            },
            "kl": {"estimator": "k3", "place": "loss", "beta": 0.01},
            "train": TRAIN,
        },
    ),
    "dapo": Recipe(
        "DAPO: clip-higher, dynamic sampling, overlong penalty (Yu et al. 2025)",
        {
            "reward": {"overlong": {"buffer": 8, "penalty": 1.0}},
            "rollout": {
                "batch_size": 64, "per_prompt": 8, "max_new_tokens": 32, "dynamic": True,
            },
            "ppo": {
                "advantage": "grpo", "scale_rewards": "group", "loss_aggregation": "token",
                "epochs": 1, "minibatches": 4, "micro_batch_size": 16, "clip_range": 0.2,
                "clip_range_high": 0.28,
            },
            "kl": {"estimator": "k3", "place": "loss", "beta": 0.01},
            "train": {"steps": 60, "learning_rate": 1e-4, "warmup_steps": 2},
        },
    ),
    "reinforce-plus-plus": Recipe(
        "REINFORCE++: neither a value function nor groups (Hu 2025)",
        {
            "rollout": SMALL,
            "ppo": {
                "advantage": "reinforce_plus_plus", "epochs": 1, "minibatches": 4,
                "micro_batch_size": 16, "clip_range": 0.2, "gamma": 1.0, "whiten": True,
            },
            "kl": {"estimator": "k1", "place": "reward", "beta": 0.05},
            "train": TRAIN,
        },
    ),
    "ppo-ziegler": Recipe(
        "PPO with an adaptive KL coefficient (Ziegler et al. 2019)",
        {
            "model": {"value": "shared"},
            "reward": {"normalise": "reference", "normalise_samples": 256},
            "rollout": {"batch_size": 64, "max_new_tokens": 24, "temperature": 0.7},
            "ppo": {
                "advantage": "gae", "epochs": 4, "minibatches": 1, "micro_batch_size": 32,
                "clip_range": 0.2, "gamma": 1.0, "lam": 0.95, "whiten": True,
                "whiten_rewards": True, "value_coef": 0.1, "value_clip": 0.2,
            },
            "kl": {"controller": "adaptive", "beta": 0.15, "target": 6.0, "horizon": 400},
            "train": {"steps": 60, "learning_rate": 1e-4, "schedule": "linear"},
        },
    ),
    "ppo-nplus": Recipe(
        "PPO with a value function from the reward model (Huang et al. 2024)",
        {
            "model": {"value": "separate"},
            "reward": {"normalise": "reference", "missing_eos_penalty": 1.0},
            "rollout": {"batch_size": 64, "max_new_tokens": 32, "temperature": 0.7},
            "ppo": {
                "advantage": "gae", "epochs": 4, "minibatches": 1, "micro_batch_size": 32,
                "clip_range": 0.2, "gamma": 1.0, "lam": 0.95, "whiten": True, "value_coef": 0.1,
                "value_clip": 0.2, "value_init": "reward_model",
            },
            "kl": {"controller": "fixed", "beta": 0.05},
            "train": {"steps": 60, "learning_rate": 1e-4, "schedule": "linear", "adam_eps": 1e-5},
        },
    ),
    "vc-ppo": Recipe(
        "VC-PPO: a pretrained value function with a λ of its own (Yuan et al. 2025)",
        {
            "model": {"value": "separate"},
            "reward": {"normalise": "reference"},
            "rollout": SMALL,
            "ppo": {
                "advantage": "gae", "value_init": "reward_model", "value_warmup": 5, "lam": 0.95,
                "lam_value": 1.0, "gamma": 1.0, "epochs": 2, "minibatches": 2,
                "micro_batch_size": 32, "clip_range": 0.2,
            },
            "kl": {"beta": 0.05},
            "train": TRAIN,
        },
    ),
}  # fmt: skip
"""By the name of the example; `ppo` is the starter run."""

RATE, ADAPTER_RATE = 1e-6, 1e-5
"""Learning rates for models of the sizes that people train."""
TOKENS = 256
"""Length of their responses."""


def for_real_models(settings: dict[str, dict[str, Any]], *, gpu: bool) -> dict[str, dict[str, Any]]:
    """The settings for other models than the starter's.

    Args:
        settings: of a recipe.
        gpu: whether the run computes on a GPU.
    """
    changed = copy.deepcopy(settings)
    changed["rollout"]["max_new_tokens"] = TOKENS
    changed["train"] |= {
        "learning_rate": ADAPTER_RATE if "lora" in settings else RATE,
        "steps": 500,
        "warmup_steps": 10,
        "save_every": 50,
    }
    changed["ppo"]["micro_batch_size"] = 8
    if "horizon" in changed.get("kl", {}):
        changed["kl"] |= {"horizon": 10_000, "beta": 0.05}
    if "overlong" in changed.get("reward", {}):
        changed["reward"]["overlong"]["buffer"] = TOKENS // 4
    if gpu:
        changed["model"] = changed.get("model", {}) | {"dtype": "bfloat16"}
    return changed
