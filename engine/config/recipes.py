"""The recipes of examples/, for `rlhf-tui init`.

They are written for the starter models; :func:`for_real_models` changes what depends on the size.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

from engine import starter
from engine.config.yaml_document import parse_yaml
from engine.kl import usual_horizon


class Recipe(NamedTuple):
    """A way to train."""

    title: str
    file: Path
    """A configuration of the starter."""

    def settings(self) -> dict[str, dict[str, Any]]:
        """By section and key, without the models and the data."""
        tree = parse_yaml(self.file.read_text(encoding="utf-8"), str(self.file))
        del tree["model"]["policy"], tree["data"], tree["reward"]["model"]
        return {section: keys for section, keys in tree.items() if keys}


_FOLDER = starter.FOLDER / "recipes"
"""Copies of files in examples/, which is no part of the package; `make docs` writes them."""
_TITLES = {
    "lora": "PPO that trains adapters (LoRA); the model itself is frozen and is the reference",
    "rloo": "RLOO: several responses to a prompt in place of a value function",
    "grpo": "GRPO: advantages within groups, KL in the loss (Shao et al. 2024)",
    "dr-grpo": "Dr. GRPO: GRPO without its biases of length and difficulty (Liu et al. 2025)",
    "gspo": "GSPO: GRPO with one ratio for a whole response (Zheng et al. 2025)",
    "gmpo": "GMPO: GRPO with the geometric mean of a response's ratios (Zhao et al. 2025)",
    "dapo": "DAPO: clip-higher, dynamic sampling, overlong penalty (Yu et al. 2025)",
    "reinforce-plus-plus": "REINFORCE++: neither a value function nor groups (Hu 2025)",
    "ppo-ziegler": "PPO with an adaptive KL coefficient (Ziegler et al. 2019)",
    "ppo-nplus": "PPO with a value function from the reward model (Huang et al. 2024)",
    "vc-ppo": "VC-PPO: a pretrained value function with a λ of its own (Yuan et al. 2025)",
}
RECIPES = {
    "ppo": Recipe(
        "PPO with a value function and an adaptive KL coefficient", starter.FOLDER / "demo.yaml"
    ),
    **{name: Recipe(title, _FOLDER / f"{name}.yaml") for name, title in _TITLES.items()},
}
"""By the name of the example; `ppo` is the starter run."""

RATE, ADAPTER_RATE = 1e-6, 1e-5
"""Learning rates for models of the sizes that people train."""
TOKENS = 256
"""Length of their responses."""
MICRO_BATCH = {"cpu": 8, "gpu": 16}
"""Responses per pass. With 8, a GPU waits for the host: 0.5 B took twice as long on an H200. A run
that runs out of memory halves it by itself."""


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
    changed["ppo"]["micro_batch_size"] = MICRO_BATCH["gpu" if gpu else "cpu"]
    if "horizon" in changed.get("kl", {}):
        horizon = usual_horizon(changed["rollout"]["batch_size"])
        changed["kl"] |= {"horizon": horizon, "beta": 0.05}
    if "overlong" in changed.get("reward", {}):
        changed["reward"]["overlong"]["buffer"] = TOKENS // 4
    if gpu:
        changed["model"] = changed.get("model", {}) | {"dtype": "bfloat16"}
    return changed
