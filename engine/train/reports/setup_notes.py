"""Notes on settings that are allowed but rarely intended, shown by `check` and at a run's start."""

import math

import msgspec
import torch

from engine.config.file import complete
from engine.config.schema import RunConfig
from engine.config.sections.ppo import ADVANTAGES, PPOConfig
from engine.kl import horizon_for, largest_change, usual_horizon
from engine.train.run import Run

MIN_FACTOR = 4.0
"""Factor by which the adaptive controller should be able to change beta within a run."""
TRIAL_STEPS = 50
"""A shorter run is a trial, for which the controller may be too slow."""
LARGE_MODEL = 50_000_000
"""Number of weights above which a GPU's matrix products take longer than launching them. With the
starter's 4 million, float32 is as fast as bfloat16 (benchmarks/RESULTS.md)."""
BFLOAT16_SINCE = 8
"""Major compute capability of NVIDIA's first GPUs with hardware for bfloat16, such as A100."""
OF_THE_VALUE_LOSS = ("value_coef", "value_clip", "value_head_rate")
"""Keys of `ppo` that only affect the value loss."""


def setup_notes(config: RunConfig, run: Run) -> list[str]:
    """Returns a line for each setting that is rarely intended.

    Args:
        config: the configuration of the run.
        run: with its prompts and tokenizer loaded. Its own configuration may be a smaller one.
    """
    return [
        *few_prompts(config, len(run.prompts)),
        *plain_prompts(run),
        *slow_controller(config),
        *ignored_keys(config),
    ]


def few_prompts(config: RunConfig, count: int) -> list[str]:
    """Returns a line if a step takes more prompts than there are."""
    wanted = config.rollout.batch_size // config.responses_per_prompt
    if count >= wanted:
        return []
    found = "is only 1 prompt" if count == 1 else f"are only {count} prompts"
    return [f"there {found} in data.prompts, and each step takes {wanted}: they are repeated"]


def plain_prompts(run: Run) -> list[str]:
    """Returns a line if the policy has a chat template, but gets plain text."""
    prompt = run.prompts.for_step(1)[0]
    rendered = any(token in prompt.text for token in run.tokenizer.all_special_tokens)
    if not run.tokenizer.chat_template or prompt.messages is not None or rendered:
        return []
    return [
        "the policy has a chat template, but prompts are given to it as plain text; data.chat: "
        "true makes each of them a user message (docs/models.md)"
    ]


def slow_controller(config: RunConfig) -> list[str]:
    """Returns a line if the adaptive controller can hardly change beta in the whole run."""
    batch, kl = config.rollout.batch_size, config.kl
    change = largest_change(kl.horizon, batch)
    exponent = config.train.steps * math.log1p(change)
    trial = config.train.steps < TRIAL_STEPS
    if kl.controller != "adaptive" or trial or exponent >= math.log(MIN_FACTOR):
        return []
    enough = MIN_FACTOR ** (1 / config.train.steps) - 1
    horizon = min(usual_horizon(batch), max(1, math.floor(horizon_for(enough, batch))))
    return [
        f"the adaptive controller changes beta by at most {change:.2%} in a step, and by a factor "
        f"of {math.exp(exponent):.2g} in the whole run, too slowly for a KL that runs away; "
        f"kl.horizon: {horizon} allows {100 * largest_change(horizon, batch):.2g}% a step"
    ]


def ignored_keys(config: RunConfig) -> list[str]:
    """Returns a line for keys of `ppo` that are set, but have no effect beside the others."""
    ppo = config.ppo
    loss, traits = ppo.policy_loss, ppo.traits
    groups: list[tuple[tuple[str, ...], bool, str]] = [
        (
            ("sapo_temperature", "sapo_temperature_negative"),
            loss == "sapo",
            "ppo.policy_loss: sapo",
        ),
        (
            ("vespo_k", "vespo_lambda", "vespo_k_negative", "vespo_lambda_negative"),
            loss == "vespo",
            "ppo.policy_loss: vespo",
        ),
        (("dppo_ratio_cap",), loss.startswith("dppo"), "ppo.policy_loss: dppo_tv or dppo_kl"),
        (
            ("entropy_coef_step", "entropy_coef_min", "entropy_coef_max"),
            ppo.entropy_target is not None,
            "ppo.entropy_target",
        ),
        (("clip_cov_range",), ppo.clip_cov > 0, "ppo.clip_cov"),
        (("kl_cov_coef",), ppo.kl_cov > 0, "ppo.kl_cov"),
        (
            ("rollout_correction_cap", "rollout_correction_floor"),
            ppo.rollout_correction != "none",
            "ppo.rollout_correction",
        ),
        (
            ("lam", "lam_value", "lam_alpha", "whiten_rewards", *OF_THE_VALUE_LOSS),
            traits.value_function,
            _estimators("value_function"),
        ),
        (("baseline",), traits.baseline, _estimators("baseline")),
        (("scale_rewards",), traits.scale_rewards, _estimators("scale_rewards")),
    ]
    without = [(keys, f"without {needed}") for keys, used, needed in groups if not used]
    if config.linear_value:
        fitted = (
            "with model.value: reward_model, whose values are fitted to the returns and not "
            "trained by a loss"
        )
        without.append((OF_THE_VALUE_LOSS, fitted))
    return [
        f"{' and '.join(given)} {'has' if len(given) == 1 else 'have'} no effect {why}"
        for keys, why in without
        if (given := _given(config, keys))
    ]


def _estimators(trait: str) -> str:
    """Returns `ppo.advantage: NAME or NAME`, with the estimators that have a trait."""
    names = [name for name, traits in ADVANTAGES.items() if getattr(traits, trait)]
    return f"ppo.advantage: {' or '.join(names)}"


def _given(config: RunConfig, keys: tuple[str, ...]) -> list[str]:
    """Returns those of these keys of `ppo` that differ from their defaults beside the others."""
    plain = PPOConfig()
    unset = msgspec.structs.replace(config.ppo, **{key: getattr(plain, key) for key in keys})
    default = complete(msgspec.structs.replace(config, ppo=unset)).ppo
    return [f"ppo.{k}" for k in keys if getattr(config.ppo, k) != getattr(default, k)]


def dtype_note(device: torch.device, dtype: str, weights: int) -> str:
    """Returns a sentence if another `model.dtype` is much faster on a GPU; "" otherwise."""
    if device.type != "cuda" or weights < LARGE_MODEL:
        return ""
    if dtype == "float32":
        return (
            "model.dtype is float32, with which a GPU trains several times slower than with "
            "bfloat16 and needs more memory"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip or major >= BFLOAT16_SINCE:
        return ""
    return (
        f"model.dtype is bfloat16, for which this GPU (compute capability {major}.{minor}) has no "
        "hardware: it takes less memory than float32, but is not faster"
    )
