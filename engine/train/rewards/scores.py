"""What a reward source may return for a response: a finite number, one for each turn, or None."""

import math
from typing import Any

from engine.errors import RewardError, encodable, shortened
from engine.train.rewards.source import RewardInputs, Score, whole

MAX_SCORE = 3.4028234663852886e38
"""The largest number in float32."""
SHOWN_SCORE = 100
"""Characters of a score in an error message."""
SHOWN_TEXT = 120
"""Characters of a prompt or a response in an error message."""


def validate_scores(name: str, scores: Any, inputs: RewardInputs) -> list[Score]:
    """Converts a source's scores to floats.

    Raises:
        RewardError: there is not one score per response, or one is neither None nor a finite
            number in float32, with which the policy is trained, nor as many of them as the response
            has turns.
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
    numbers: list[Score] = []
    for i, score in enumerate(scores):
        turns = inputs.turn_count(i)
        number = _converted(score, turns)
        if number is not None and not _is_finite(whole(number)):
            each = f", a list of {turns}, one for each turn of the policy" if inputs.turns else ""
            raise RewardError(
                f"reward '{name}' returned {_shown_score(score)} for response {i} of step "
                f"{inputs.step} (prompt: {shown_prompt(inputs, i)}, "
                f"response: {shown(inputs.texts[i])}): "
                f"a score is a finite number of 32 bits{each}, or None if the source does not "
                "score the response"
            )
        numbers.append(number)
    return numbers


def _converted(score: Any, turns: int) -> Score:
    """A score as floats; NaN if it is neither a number nor as many as there are turns."""
    if score is None:
        return None
    if not isinstance(score, list | tuple) and getattr(score, "ndim", 0) != 1:
        return _number(score)
    numbers = [_number(each) for each in score]
    if len(numbers) != turns or not all(map(_is_finite, numbers)):
        return math.nan
    return numbers if turns > 1 else numbers[0]


def _number(value: Any) -> float:
    """The value as a float; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # the last for integers over 1e308
        return math.nan


def _is_finite(number: float | None) -> bool:
    """Whether a number is finite in float32."""
    return number is not None and abs(number) <= MAX_SCORE


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
