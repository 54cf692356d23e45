"""What a reward source may return: one finite number, or None, for each response."""

import math
import reprlib
from typing import Any

from engine.errors import RewardError
from engine.train.rewards.source import RewardInputs


def validate_scores(name: str, scores: list[Any], inputs: RewardInputs) -> list[float | None]:
    """Converts a source's scores to floats.

    Raises:
        RewardError: there is not one score per response, or one is neither None nor finite.
    """
    if len(scores) != len(inputs):
        raise RewardError(
            f"reward '{name}' returned {len(scores)} scores for {len(inputs)} responses at step "
            f"{inputs.step}: it must return one for each"
        )
    numbers: list[float | None] = []
    for i, score in enumerate(scores):
        try:
            number = None if score is None else float(score)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise RewardError(
                f"reward '{name}' returned {reprlib.repr(score)} for response {i} of step "
                f"{inputs.step} (prompt: {inputs.batch.prompts[i].text!r}, "
                f"response: {inputs.texts[i]!r}): "
                "a score is a finite number, or None if the source does not score the response"
            )
        numbers.append(number)
    return numbers
