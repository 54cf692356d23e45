"""Calls of reward sources that run on rank 0, and a description of what they raise."""

import traceback
from collections.abc import Iterator

from engine.errors import LinkError, RewardError, error_text, shortened
from engine.train.rewards.scores import shown, shown_prompt, validate_scores
from engine.train.rewards.source import Reward, RewardCallError, RewardInputs
from engine.train.rollout.rollout import ReportProgress

FIRST_DELAY = 1.0
"""Seconds before the first retry; each further one waits twice as long."""
MAX_DELAY = 60.0
"""Seconds that a retry waits at most; commands are not executed meanwhile."""
SHOWN_MESSAGE = 240
"""Characters of an exception's message in ours."""


def call_source(
    name: str, reward: Reward, inputs: RewardInputs, report: ReportProgress
) -> list[float | None]:
    """Calls a source on rank 0, once.

    Args:
        name: of the source.
        reward: the source.
        inputs: B responses.
        report: see :class:`Reward`.

    Raises:
        RewardError: the scores cannot be used. There is no retry: a function that returns them
            would return them again.
        RewardCallError: the source raised.
        LinkError: the supervisor is gone, which `report` notices.
    """
    try:
        return validate_scores(name, reward(inputs, report), inputs)
    except (RewardError, LinkError):
        raise
    # sys.exit() in a function is no reason to end the rank without a word.
    except (Exception, SystemExit) as error:
        raise RewardCallError(_describe(name, error, inputs), _traceback(error)) from error


def retry_delays(retries: int) -> Iterator[float]:
    """Seconds to wait before each further call of a source that raised."""
    for attempt in range(retries):
        yield min(FIRST_DELAY * 2**attempt, MAX_DELAY)


def _describe(name: str, error: BaseException, inputs: RewardInputs) -> str:
    """One line: source, step and exception, and the response in question if it is known."""
    text = f"reward '{name}' at step {inputs.step}: {_exception_text(error)}"
    index = _response_in_hand(error, inputs)
    if index is None:
        first = shown_prompt(inputs, 0)
        return f"{text} (called with {len(inputs)} responses, first prompt: {first})"
    response = shown(inputs.texts[index])
    return f"{text} (response {index}, prompt: {shown_prompt(inputs, index)}, response: {response})"


def _exception_text(error: BaseException) -> str:
    """Type and message on one line."""
    message = shortened(" ".join(error_text(error).split()), SHOWN_MESSAGE)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    return text.encode("utf-8", "replace").decode()


def _response_in_hand(error: BaseException, inputs: RewardInputs) -> int | None:
    """The response that the failed function was looking at; None if that cannot be told.

    The function has all responses. A loop over them leaves the current one, or its prompt, in a
    local variable of a frame of the traceback. The innermost such frame counts.
    """
    prompts = [p.text for p in inputs.batch.prompts]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        # Exact types only: a comparison with another object may run the user's code.
        values = {value for value in frame.f_locals.values() if type(value) is str}
        for texts in (inputs.texts, prompts):
            found = [i for i, text in enumerate(texts) if text and text in values]
            if len(found) == 1:
                return found[0]
    return None
