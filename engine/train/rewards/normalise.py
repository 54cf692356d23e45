"""Normalisation and clipping of scores."""

from dataclasses import dataclass

from torch import Tensor

from engine.config.schema import RewardConfig
from engine.errors import RewardError


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
    def of(cls, scores: Tensor) -> "Normaliser":
        """Computes mean and standard deviation of the reference's scores, (n,) float32.

        Raises:
            RewardError: all scores are the same.
        """
        std = float(scores.std(correction=0))
        if std < 1e-8:
            raise RewardError(
                "reward.normalise: reference needs scores that vary, but every response of the "
                f"reference got {float(scores[0]):g}: use reward.normalise: none"
            )
        return cls(float(scores.mean()), std)

    def __call__(self, raw: Tensor, config: RewardConfig, ended: Tensor) -> Tensor:
        """Normalises and clips, then subtracts the penalty for truncated responses.

        Args:
            raw: (B,) float32.
            config: with `clip` and `missing_eos_penalty`.
            ended: (B,) bool; False where a response was cut off.

        Returns:
            (B,) float32.
        """
        scores = (raw - self.mean) / self.std
        if config.clip is not None:
            scores = scores.clamp(-config.clip, config.clip)
        if config.missing_eos_penalty:
            scores = scores - config.missing_eos_penalty * (~ended).to(scores.dtype)
        return scores
