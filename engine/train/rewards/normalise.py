"""Normalisation, clipping and penalties of scores."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.sections.reward import OverlongConfig, RewardConfig
from engine.errors import RewardError
from engine.train.ppo.masked import GROUP_STD_EPS

Scale = tuple[float, float]
"""Mean and standard deviation."""


def group_scales(scores: list[float | None], per_prompt: int) -> list[Scale]:
    """Returns for each of a source's B scores the mean and deviation over the prompt's responses.

    (score − mean) / deviation is the score normalised within its group (GDPO, Liu et al. 2026,
    arXiv 2601.05242; `normalize_then_sum` in TRL). The deviation has n − 1 in its denominator, and
    :data:`GROUP_STD_EPS` is added to it. Both are of the scores that are not None.

    Args:
        scores: those of one prompt are adjacent.
        per_prompt: responses to each prompt.
    """
    values = torch.tensor([math.nan if s is None else s for s in scores], dtype=torch.float64)
    groups = values.view(-1, per_prompt)
    mean = groups.nanmean(1, keepdim=True)
    centred = groups - mean
    count = (~groups.isnan()).sum(1, keepdim=True)
    variance = (centred**2).nansum(1, keepdim=True) / (count - 1).clamp(min=1)
    scales = torch.cat([mean, variance.sqrt() + GROUP_STD_EPS], 1).repeat_interleave(per_prompt, 0)
    return [(mean, deviation) for mean, deviation in scales.tolist()]


@dataclass
class Normaliser:
    """Turns raw scores into the scores that are trained on.

    The mean and the standard deviation are part of a checkpoint. Normalising the scores on samples
    of the reference model is from Ziegler et al. 2019; see also Huang et al. 2024 (arXiv
    2403.17031).
    """

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, scores: Tensor, key: str = "reward.normalise") -> "Normaliser":
        """Computes mean and standard deviation of the reference's scores, (n,) float32.

        Args:
            scores: not normalised.
            key: the configuration key that asks for it, for the error message.

        Raises:
            RewardError: all scores are the same.
        """
        wide = scores.double()  # in float32 the deviation of 64 times 1.3 is 1e-7, not 0
        std = float(wide.std(correction=0))
        if std < 1e-8:
            raise RewardError(
                f"{key}: reference needs scores that vary, but every response of the "
                f"reference got {float(scores[0]):g}: use {key}: none"
            )
        return cls(float(wide.mean()), std)

    def __call__(
        self,
        raw: Tensor,
        config: RewardConfig,
        ended: Tensor,
        lengths: Tensor,
        max_new_tokens: int,
    ) -> Tensor:
        """Normalises and clips, then subtracts the penalties for truncated and overlong responses.

        Args:
            raw: (B,) float32.
            config: with `clip`, `missing_eos_penalty` and `overlong`.
            ended: (B,) bool; False where a response was cut off.
            lengths: (B,) int64.
            max_new_tokens: the limit of the lengths, for `overlong`.

        Returns:
            (B,) float32.
        """
        scores = (raw - self.mean) / self.std
        if config.clip is not None:
            scores = scores.clamp(-config.clip, config.clip)
        if config.missing_eos_penalty:
            scores = scores - config.missing_eos_penalty * (~ended).to(scores.dtype)
        if config.overlong.buffer:
            scores = scores - overlong_penalty(lengths, max_new_tokens, config.overlong)
        return scores


def overlong_penalty(lengths: Tensor, max_new_tokens: int, config: OverlongConfig) -> Tensor:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), as a positive number.

    0 up to `max_new_tokens` − `buffer` tokens, then linear up to `penalty` at `max_new_tokens`:
    (B,) int64 → (B,) float32.
    """
    over = lengths - (max_new_tokens - config.buffer)
    return config.penalty * (over.float() / config.buffer).clamp(0.0, 1.0)
