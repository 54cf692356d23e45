"""Normalising and clipping of scores."""

from dataclasses import dataclass

from torch import Tensor

from engine.config.schema import RewardConfig
from engine.errors import RewardError


@dataclass
class Normaliser:
    """Turns raw scores into those that are trained on; kept in the checkpoint."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, scores: Tensor) -> "Normaliser":
        """From reference samples' scores (n,). Raises RewardError where they do not vary."""
        std = float(scores.std(correction=0))
        if std < 1e-8:
            raise RewardError(
                "reward.normalise: reference needs scores that vary, but every reference answer "
                f"got {float(scores[0]):g}: use reward.normalise: none"
            )
        return cls(float(scores.mean()), std)

    def __call__(self, raw: Tensor, config: RewardConfig, ended: Tensor) -> Tensor:
        """Normalised, clipped, then less the penalty for answers that were cut off; (B,)."""
        scores = (raw - self.mean) / self.std
        if config.clip is not None:
            scores = scores.clamp(-config.clip, config.clip)
        if config.missing_eos_penalty:
            scores = scores - config.missing_eos_penalty * (~ended).to(scores.dtype)
        return scores
