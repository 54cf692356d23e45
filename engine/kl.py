"""The controllers of the KL coefficient.

Source of the adaptive controller: Ziegler et al. 2019, section 2.2, and `AdaptiveKLController` in
openai/lm-human-preferences.
"""

import math
from typing import Literal, Protocol

MAX_ERROR = 0.2
"""The proportional error is clipped to ±20 %, which limits the effect of one outlying batch."""

USUAL_CHANGE = 0.01
"""The largest relative change of beta in a step of Ziegler et al., who have 512 responses in it."""


class KLControl(Protocol):
    """Parameters of a controller: the `kl` section of a configuration, or live settings."""

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


def largest_change(horizon: float, episodes: int) -> float:
    """The largest relative change of beta in a step of the adaptive controller: 0.01 is 1 %.

    Args:
        horizon: of the controller, in responses.
        episodes: number of responses in a step.
    """
    return MAX_ERROR * episodes / horizon


def horizon_for(change: float, episodes: int) -> float:
    """The horizon, in responses, whose :func:`largest_change` is `change`."""
    return MAX_ERROR * episodes / change


def usual_horizon(episodes: int) -> int:
    """The horizon at which beta changes by at most 1 % in a step of `episodes` responses."""
    return round(horizon_for(USUAL_CHANGE, episodes))


def next_beta(control: KLControl, kl: float, episodes: int) -> float:
    """The KL coefficient of the next step.

    Args:
        control: parameters of the step that measured `kl`.
        kl: mean KL of the batch, in nats per response.
        episodes: number of responses in the batch.

    Returns:
        The current beta with the fixed controller, or if the KL is not finite. Otherwise
        β·(1 + e·episodes/horizon) with e = clip(KL/target − 1, ±0.2), clipped to
        [beta_min, beta_max]. The product cannot leave 0, so from beta 0 the next value is beta_min.
    """
    if control.controller == "fixed" or not math.isfinite(kl):
        return control.beta
    error = min(max(kl / control.target - 1, -MAX_ERROR), MAX_ERROR)
    beta = control.beta * (1 + error * episodes / control.horizon)
    return min(max(beta, control.beta_min), control.beta_max)
