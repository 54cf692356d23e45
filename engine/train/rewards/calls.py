"""Calls of reward sources that run on rank 0, and a description of what they raise."""

import traceback
from collections.abc import Iterator

import torch

from engine.errors import LinkError, RewardError, error_text, shortened
from engine.progress import ReportProgress
from engine.train.rewards.scores import shown, shown_prompt, validate_scores
from engine.train.rewards.source import (
    IncompleteScoresError,
    Reward,
    RewardCallError,
    RewardInputs,
)

FIRST_DELAY = 1.0
"""Seconds before the first retry; each further one waits twice as long."""
MAX_DELAY = 60.0
"""Seconds that a retry waits at most; commands are not executed meanwhile."""
SHOWN_MESSAGE = 240
"""Characters of an exception's message in ours."""


class SourceCall:
    """The calls of a source of rank 0 for the same responses.

    A service may score some of them and fail for others; only these are asked for again.
    """

    def __init__(
        self, name: str, reward: Reward, inputs: RewardInputs, report: ReportProgress
    ) -> None:
        """Calls nothing yet.

        Args:
            name: of the source.
            reward: the source.
            inputs: B responses.
            report: see :class:`Reward`.
        """
        self._name = name
        self._reward = reward
        self._inputs = inputs
        self._report = report
        self._scores: dict[int, float | None] = {}

    def __call__(self) -> list[float | None]:
        """Calls the source once, with the responses that are not scored yet; returns B scores.

        Raises:
            RewardError: the scores cannot be used. There is no retry: a function that returns them
                would return them again.
            RewardCallError: the source raised.
            LinkError: the supervisor is gone, which `report` notices.
        """
        name, count = self._name, len(self._inputs)
        rows = [i for i in range(count) if i not in self._scores]
        part = self._inputs.select(torch.tensor(rows)) if self._scores else self._inputs
        try:
            scores = validate_scores(name, self._reward(part, self._report), part)
        except (RewardError, LinkError):
            raise
        except IncompleteScoresError as error:
            self._scores |= {rows[i]: score for i, score in error.scores.items()}
            left = count - len(self._scores)
            text = f"reward '{name}' at step {part.step}: {error} "
            # The text says everything: a traceback would show our own code alone.
            raise RewardCallError(
                f"{text}({left} of {count} responses are not scored)",
                recovers=True, works_again=error.works_again, retry_after=error.retry_after,
            ) from error  # fmt: skip
        # sys.exit() in a function is no reason to end the rank without a word.
        except (Exception, SystemExit) as error:
            raise RewardCallError(_describe(name, error, part), _traceback(error)) from error
        self._scores |= zip(rows, scores, strict=True)
        # Those of earlier calls, too, of which other responses failed.
        return validate_scores(name, [self._scores[i] for i in range(count)], self._inputs)


def retry_delays(retries: int) -> Iterator[float]:
    """Seconds to wait before each further call of a source that raised."""
    for attempt in range(retries):
        yield min(FIRST_DELAY * 2**attempt, MAX_DELAY)


def _describe(name: str, error: BaseException, inputs: RewardInputs) -> str:
    """One line: source, step and exception, and the response in question if it is known."""
    text = f"reward '{name}' at step {inputs.step}: {_exception_text(error)}"
    conversations = inputs.batch.prompts[0].messages is not None
    if conversations and isinstance(error, TypeError | AttributeError):
        text += "; of conversations, each completion is a list of messages"
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
    """The response that the failed function was looking at; None if that is not known.

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
