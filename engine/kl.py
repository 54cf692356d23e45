"""The KL coefficient's controllers.

Source of the adaptive one: Ziegler et al. 2019, section 2.2, and `AdaptiveKLController` in
openai/lm-human-preferences.
"""

import math

from engine.config.settings import Settings

MAX_ERROR = 0.2
"""The proportional error is held to ±20 %, so one wild batch cannot move beta far."""


def next_beta(settings: Settings, kl: float, episodes: int) -> float:
    """The coefficient for the step after one that measured `kl`.

    Args:
        settings: in force during that step.
        kl: nats per response, the batch's mean.
        episodes: responses in the batch.

    Returns:
        The same beta with the fixed controller, or where the KL is no number; else
        β·(1 + e·episodes/horizon) with e = clip(KL/target − 1, ±0.2), within [beta_min, beta_max].
        From beta 0 a product would never leave it, so the adaptive controller begins again at
        beta_min.
    """
    if settings.controller == "fixed" or not math.isfinite(kl):
        return settings.beta
    error = min(max(kl / settings.target - 1, -MAX_ERROR), MAX_ERROR)
    beta = settings.beta * (1 + error * episodes / settings.horizon)
    return min(max(beta, settings.beta_min), settings.beta_max)
