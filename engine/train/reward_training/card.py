"""The card of a trained reward model: README.md in its folder."""

import re

import msgspec

from engine.config.sections.reward_training import RewardTrainingConfig
from engine.protocol.programs.reward_training import (
    HeldOutAgreement,
    RewardTrainingRequest,
    TrainedReward,
)

CARD = "README.md"
RESULT = "training.json"
"""The result as JSON, for programs."""


def card(request: RewardTrainingRequest, result: TrainedReward) -> str:
    """The card in Markdown, with the header that the hub reads."""
    changed = _changed(request.settings)
    rows = [
        ("the reward in force at their steps", result.in_force),
        (f"{_inline(result.base)} before training", result.at_start),
        ("this model", result.trained),
    ]
    table = "\n".join(f"| {name} | {agreement_text(found)} |" for name, found in rows if found)
    calibration = result.calibration
    warning = f"\n\n**{result.warning}.**" if result.warning else ""
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model]
---

# Reward model

Trained by `rlhf-tui reward train` on what people judged in the sessions
{", ".join(f"`{name}`" for name in request.sessions)}, starting from {_inline(result.base)}.
Its logit is the score of prompt and response; use it as `reward.model`.

## Judgements

{result.preferences} preferences, {result.good} responses labelled good, {result.other} labelled bad
or hack. {result.trained_on} of them train the model, {result.validated_on} choose the epoch, and
{result.held_out} are held out. No {result.split_by} is in two of these parts.

## Agreement with the held-out judgements

| scores of | agreement |
|---|---|
{table}

The agreement is the probability that the better response scores higher; ½ is chance. In brackets:
the 95 % interval.{warning}

Calibration on {calibration.comparisons} comparisons: the response that the model scores higher has
a probability of {calibration.stated:.0%} on average and is better in {calibration.right:.0%}.
Log loss {calibration.log_loss:.3f} nats (a coin has 0.693).

## Scale

{scale_text(result)}

## Training

Epoch {result.best_epoch} of {result.epochs} has the lowest loss on the judgements for validation.
{changed}

```
{_block(request.command)}
```
"""


def agreement_text(found: HeldOutAgreement) -> str:
    """`83 % of 12 (54–96 %)`."""
    return (
        f"{100 * found.agreement:.0f} % of {found.judgements} "
        f"({100 * found.low:.0f}–{100 * found.high:.0f} %)"
    )


def scale_text(result: TrainedReward) -> str:
    """How the scores compare with the recorded ones."""
    new, old = result.new_scale, result.old_scale
    text = f"Scores of the newest responses: mean {new.mean:.3g}, standard deviation {new.std:.3g}."
    if old is None or result.width is None:
        return text
    recorded = f"The recorded ones: mean {old.mean:.3g}, standard deviation {old.std:.3g}."
    if result.keeps_width:
        return f"{text} {recorded} They are about as wide, so `kl.beta` can stay."
    return (
        f"{text} {recorded} Scores are {result.width:.2g} times as wide, so the same balance with "
        f"the KL needs `kl.beta` times {result.width:.2g}; with `reward.normalise: reference` it "
        "does not."
    )


def _changed(settings: RewardTrainingConfig) -> str:
    defaults = RewardTrainingConfig()
    changed = {
        key: value
        for key, value in msgspec.structs.asdict(settings).items()
        if value != getattr(defaults, key)
    }
    if not changed:
        return "All settings are the defaults."
    return "Settings: " + ", ".join(f"{k} {_inline(str(v))}" for k, v in changed.items()) + "."


def _inline(text: str) -> str:
    """Text of the user as code on one line, which it cannot end."""
    return "`" + re.sub(r"[`\x00-\x1f\x7f]", " ", text) + "`"


def _block(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f]", " ", text).replace("```", "` ` `")
