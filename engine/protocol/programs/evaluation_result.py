"""The result of :mod:`engine.train.evaluation` run as a program, for `rlhf-tui eval`."""

from typing import Any

from msgspec import Struct


class EvaluationResult(Struct, frozen=True):
    """The evaluation of a checkpoint."""

    metrics: dict[str, float | None]
    """By name; None for a value that is not finite."""
    samples: list[dict[str, Any]]
    """All responses, as `samples --json` prints them."""
    failed: dict[str, str]
    """The sources of `eval.rewards` without metrics, each with the reason."""
