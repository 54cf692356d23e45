"""Calls reward sources that run on rank 0, and describes the errors they raise."""

import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from engine.errors import LinkError, RewardError
from engine.progress import ReportProgress
from engine.train.rewards.kinds.function import FunctionReward
from engine.train.rewards.kinds.http_client import REPORT_INTERVAL, REQUEST_THREADS
from engine.train.rewards.scores import shown, shown_prompt, validate_scores
from engine.train.rewards.source import (
    IncompleteScoresError,
    Reward,
    RewardCallError,
    RewardInputs,
    RunsUserCode,
    Score,
)
from engine.train.user_code.concurrent_calls import CallTimeoutError
from engine.train.user_code.errors import error_line, user_traceback_text

FIRST_DELAY = 1.0
"""Seconds before the first retry; doubled for each further one."""
MAX_DELAY = 60.0
"""Most seconds to wait before a retry; no commands are executed meanwhile."""


class AbandonedError(Exception):
    """Nobody waits any more for the scores of a call."""


class SourceCall:
    """Calls a rank-0 source for one set of responses, repeatedly if needed.

    A service may score some responses and fail for others; only the failed ones are requested
    again.
    """

    def __init__(self, name: str, reward: Reward, inputs: RewardInputs) -> None:
        """Calls nothing yet.

        Args:
            name: of the source.
            reward: the source.
            inputs: B responses.
        """
        self._name = name
        self._reward = reward
        self._inputs = inputs
        self._scores: dict[int, Score] = {}
        self._begun: Future[list[Score]] | None = None
        self._progress = 0, len(inputs)
        self._abandoned = False

    def begin(self) -> None:
        """Makes the next call in a thread at once; calling the object waits for it."""
        pool = ThreadPoolExecutor(1, REQUEST_THREADS)
        self._begun = pool.submit(self._call, self._set_progress)
        pool.shutdown(wait=False)

    def abandon(self) -> None:
        """Ends a call that has begun at its next report: nobody waits for its scores."""
        self._abandoned = True

    def _set_progress(self, done: int, total: int) -> None:
        if self._abandoned:
            raise AbandonedError
        self._progress = done, total

    def __call__(self, report: ReportProgress) -> list[Score]:
        """Calls the source once, with the responses that are not scored yet; returns B scores.

        Args:
            report: see :class:`Reward`.

        Raises:
            RewardCallError: the source raised, or its scores cannot be used. In the latter case
                there is no retry, since a function would return the same scores again.
            LinkError: the supervisor is gone; raised by `report`.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return self._call(report)
        while wait([begun], REPORT_INTERVAL).not_done:
            report(*self._progress)
        return begun.result()

    def _call(self, report: ReportProgress) -> list[Score]:
        name, count = self._name, len(self._inputs)
        rows = [i for i in range(count) if i not in self._scores]
        part = self._inputs.select(torch.tensor(rows)) if self._scores else self._inputs
        try:
            scores = self._validated(self._reward(part, report), part)
        except (RewardCallError, LinkError, AbandonedError):
            raise
        except IncompleteScoresError as error:
            self._scores |= {rows[i]: score for i, score in error.scores.items()}
            left = count - len(self._scores)
            text = f"reward '{name}' at step {part.step}: {error} "
            # No traceback: it would only show our own code.
            raise RewardCallError(
                f"{text}({left} of {count} responses are not scored)",
                recovers=True, works_again=error.works_again, retry_after=error.retry_after,
            ) from error  # fmt: skip
        except CallTimeoutError as error:  # its thread goes on: another call would run beside it
            text = f"reward '{name}' at step {part.step}: {error}"
            notes = "".join(f" ({note})" for note in error.__notes__)
            raise RewardCallError(text + notes, error.stack, retry=False) from error
        # sys.exit() in a reward function must not end the rank silently.
        except (Exception, SystemExit) as error:
            text = _describe(name, error, part, of_completions=type(self._reward) is FunctionReward)
            raise RewardCallError(text, user_traceback_text(error)) from error
        self._scores |= zip(rows, scores, strict=True)
        # Includes scores from earlier calls in which other responses failed.
        return self._validated([self._scores[i] for i in range(count)], self._inputs)

    def _validated(self, scores: object, inputs: RewardInputs) -> list[Score]:
        """Converts scores to floats. Raises RewardCallError if they cannot be used."""
        try:
            return validate_scores(self._name, scores, inputs)
        except RewardError as error:
            allow_reload(self._reward)
            raise RewardCallError(str(error), retry=False) from error


def allow_reload(reward: object) -> None:
    """Lets the next call import the code of a source again if its scores could not be used."""
    if isinstance(reward, RunsUserCode):
        reward.code.result_was_unusable()


def retry_delays(retries: int) -> Iterator[float]:
    """Seconds to wait before each further call of a source that raised."""
    for attempt in range(retries):
        yield min(FIRST_DELAY * 2**attempt, MAX_DELAY)


def _describe(
    name: str, error: BaseException, inputs: RewardInputs, *, of_completions: bool
) -> str:
    """Describes an error in one line: source, step, exception and, if known, line and response.

    `of_completions` is whether the source is called with completions.
    """
    text = f"reward '{name}' at step {inputs.step}: {error_line(error)}"
    conversations = inputs.batch.prompts[0].messages is not None
    if of_completions and conversations and isinstance(error, TypeError | AttributeError):
        text += "; of conversations, each completion is a list of messages"
    index = _current_response(error, inputs)
    if index is None:
        first = shown_prompt(inputs, 0)
        return f"{text} (called with {len(inputs)} responses, first prompt: {first})"
    response = shown(inputs.texts[index])
    return f"{text} (response {index}, prompt: {shown_prompt(inputs, index)}, response: {response})"


def _current_response(error: BaseException, inputs: RewardInputs) -> int | None:
    """Returns the response that the failed function was processing; None if unknown.

    The function receives all responses. A loop over them leaves the current response, or its
    prompt, in a local variable of some traceback frame. The innermost such frame is used.
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
