"""The KL coefficient's controllers.

Source of the adaptive one: Ziegler et al. 2019, section 2.2, and `AdaptiveKLController` in
openai/lm-human-preferences.
"""

import math
from typing import Literal, Protocol

MAX_ERROR = 0.2
"""The proportional error is held to ±20 %, so one wild batch cannot move beta far."""


class KLControl(Protocol):
    """What decides the next beta: the configuration's `kl` section, or a run's settings."""

    @property
    def controller(self) -> Literal["fixed", "adaptive"]: ...  # noqa: D102
    @property
    def beta(self) -> float: ...  # noqa: D102
    @property
    def target(self) -> float: ...  # noqa: D102
    @property
    def horizon(self) -> float: ...  # noqa: D102
    @property
    def beta_min(self) -> float: ...  # noqa: D102
    @property
    def beta_max(self) -> float: ...  # noqa: D102


def next_beta(control: KLControl, kl: float, episodes: int) -> float:
    """The coefficient for the step after one that measured `kl`.

    Args:
        control: in force during that step.
        kl: nats per response, the batch's mean.
        episodes: responses in the batch.

    Returns:
        The same beta with the fixed controller, or where the KL is no number; else
        β·(1 + e·episodes/horizon) with e = clip(KL/target − 1, ±0.2), within [beta_min, beta_max].
        From beta 0 a product would never leave it, so the adaptive controller begins again at
        beta_min.
    """
    if control.controller == "fixed" or not math.isfinite(kl):
        return control.beta
    error = min(max(kl / control.target - 1, -MAX_ERROR), MAX_ERROR)
    beta = control.beta * (1 + error * episodes / control.horizon)
    return min(max(beta, control.beta_min), control.beta_max)
