"""What a reward source may return: one finite number, or None, for each response."""

import math
from typing import Any

from engine.errors import RewardError
from engine.train.rewards.source import RewardInputs

SHOWN_LENGTH = 100
"""Characters of a score in an error message."""


def validate_scores(name: str, scores: Any, inputs: RewardInputs) -> list[float | None]:
    """Converts a source's scores to floats.

    Raises:
        RewardError: there is not one score per response, or one is neither None nor finite.
    """
    if not isinstance(scores, list):
        raise RewardError(
            f"reward '{name}' returned {_shown(scores)} at step {inputs.step}: it must return a "
            f"list of {len(inputs)} scores, one for each response"
        )
    if len(scores) != len(inputs):
        raise RewardError(
            f"reward '{name}' returned {len(scores)} scores for {len(inputs)} responses at step "
            f"{inputs.step}: it must return one for each"
        )
    numbers: list[float | None] = []
    for i, score in enumerate(scores):
        try:
            number = None if score is None else float(score)
        except (TypeError, ValueError, OverflowError):  # the last for integers over 1e308
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise RewardError(
                f"reward '{name}' returned {_shown(score)} for response {i} of step "
                f"{inputs.step} (prompt: {inputs.batch.prompts[i].text!r}, "
                f"response: {inputs.texts[i]!r}): "
                "a score is a finite number, or None if the source does not score the response"
            )
        numbers.append(number)
    return numbers


def _shown(value: Any) -> str:
    """A value in an error, at most :data:`SHOWN_LENGTH` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        text = "a huge integer"
    except Exception as error:
        text = f"{type(value).__name__} (its repr raises {type(error).__name__})"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= SHOWN_LENGTH else f"{text[: SHOWN_LENGTH - 1]}…"
