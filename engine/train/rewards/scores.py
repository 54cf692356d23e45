"""What a reward source may return: one finite number, or None, for each response."""

import math
from typing import Any

from engine.errors import RewardError, encodable, shortened
from engine.train.rewards.source import RewardInputs

LARGEST_SCORE = 3.4028234663852886e38
"""The largest number in float32."""
SHOWN_SCORE = 100
"""Characters of a score in an error message."""
SHOWN_TEXT = 120
"""Characters of a prompt or a response in an error message."""


def validate_scores(name: str, scores: Any, inputs: RewardInputs) -> list[float | None]:
    """Converts a source's scores to floats.

    Raises:
        RewardError: there is not one score per response, or one is neither None nor a finite
            number in float32, with which the policy is trained.
    """
    if not isinstance(scores, list):
        raise RewardError(
            f"reward '{name}' returned {_shown_score(scores)} at step {inputs.step}: it must "
            f"return a list of {len(inputs)} scores, one for each response"
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
        if number is not None and not abs(number) <= LARGEST_SCORE:
            raise RewardError(
                f"reward '{name}' returned {_shown_score(score)} for response {i} of step "
                f"{inputs.step} (prompt: {shown_prompt(inputs, i)}, "
                f"response: {shown(inputs.texts[i])}): "
                "a score is a finite number of 32 bits, or None if the source does not score the "
                "response"
            )
        numbers.append(number)
    return numbers


def shown(text: str) -> str:
    """A prompt or a response in an error, at most :data:`SHOWN_TEXT` characters of it."""
    return repr(shortened(text, SHOWN_TEXT))


def shown_prompt(inputs: RewardInputs, index: int) -> str:
    """The prompt of a response in an error."""
    return shown(inputs.batch.prompts[index].text)


def _shown_score(value: Any) -> str:
    """A score in an error, at most :data:`SHOWN_SCORE` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        text = "a huge integer"
    except Exception as error:
        text = f"{type(value).__name__} (its repr raises {type(error).__name__})"
    return shortened(encodable(text), SHOWN_SCORE)
