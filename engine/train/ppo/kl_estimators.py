"""Per-token estimators of the KL to the reference, selected by `kl.estimator`.

To add one, write a function of log π − log π_ref at sampled tokens, list it in
:data:`KL_ESTIMATORS`, and add its name to the type of the key.

Source: Schulman 2020, "Approximating KL divergence" (http://joschu.net/blog/kl-approx.html).
"""

from collections.abc import Callable

from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Bound on log π_ref − log π in k3, which keeps its exponential finite."""

KINK = 1e-3
"""Log ratios up to this are small for the absolute value. Rounding makes about 1e-6 in float32."""


def k1(log_ratio: Tensor) -> Tensor:
    """The log ratio itself: unbiased, of large variance, negative for some tokens."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half its square: biased, never negative; the gradient is unbiased for samples of π."""
    return 0.5 * log_ratio**2


def k3(log_ratio: Tensor) -> Tensor:
    """GRPO's penalty, π_ref/π − 1 − log(π_ref/π): unbiased and never negative."""
    # Bounded in both terms: with a bound on the exponential alone, k3 would decrease beyond it.
    bounded = log_ratio.clamp(min=-LOG_RATIO_LIMIT)
    return (-bounded).exp() - 1 + bounded


def absolute(log_ratio: Tensor) -> Tensor:
    """The size of the log ratio: biased, never negative.

    In the loss, its gradient is that of the total variation, times 2, for samples of π. Within
    ±`KINK` it rises linearly from -1 to 1: where the ratio is 1, as before the first update, its
    sign would otherwise be that of a rounding error, another one for other micro-batches.
    """
    return log_ratio * (log_ratio.detach() / KINK).clamp(-1, 1)


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
}
"""Each maps log π − log π_ref of any shape to an estimate in nats of the same shape."""
