"""Calls of reward sources that run on rank 0: retries, and a description of what they raise."""

import logging
import time
import traceback
from dataclasses import dataclass

import torch

from engine.errors import RewardError, error_text
from engine.train.rewards.scores import validate_scores
from engine.train.rewards.source import (
    IncompleteScoresError,
    Reward,
    RewardCallError,
    RewardInputs,
)
from engine.train.rollout.rollout import ReportProgress

log = logging.getLogger("engine")

FIRST_DELAY = 1.0
"""Seconds before the first retry; each further one waits twice as long."""
MAX_DELAY = 60.0
"""Seconds that a retry waits at most; commands are not executed meanwhile."""
SHOWN_CHARACTERS = 120
"""Characters of a prompt, a response or an exception in an error message."""


@dataclass(frozen=True)
class Caller:
    """Calls the sources of one run on rank 0."""

    retries: int
    """Further calls of a source that raises, with the responses that it has not scored yet."""

    def __call__(
        self,
        name: str,
        reward: Reward,
        inputs: RewardInputs,
        report: ReportProgress,
        *,
        retry: bool,
    ) -> list[float | None]:
        """Returns a source's scores.

        Args:
            name: of the source.
            reward: the source.
            inputs: B responses.
            report: see :class:`Reward`.
            retry: whether a source that raises is called again.

        Raises:
            RewardError: the scores cannot be used. There is no retry: a function that returns them
                would return them again.
            RewardCallError: the source raised in every call.
        """
        delay = FIRST_DELAY
        scores: dict[int, float | None] = {}
        for left in range(self.retries if retry else 0, -1, -1):
            rows = [i for i in range(len(inputs)) if i not in scores]
            part = inputs if not scores else inputs.select(torch.tensor(rows))
            wait = delay
            try:
                scores |= zip(rows, validate_scores(name, reward(part, report), part), strict=True)
                return [scores[i] for i in range(len(inputs))]
            except RewardError:
                raise
            except IncompleteScoresError as error:
                scores |= {rows[i]: score for i, score in error.scores.items()}
                text = (
                    f"reward '{name}' at step {inputs.step}: {error} "
                    f"({len(inputs) - len(scores)} of {len(inputs)} responses are not scored)"
                )
                if not left:
                    # The text says everything: a traceback would show our own code alone.
                    raise RewardCallError(
                        text, recovers=True, works_again=error.works_again
                    ) from error
                wait = max(delay, min(error.retry_after, MAX_DELAY))
                log.warning("%s; these are asked for again in %.0f s", text, wait)
            # sys.exit() in a function is no reason to end the rank without a word.
            except (Exception, SystemExit) as error:
                if not left:
                    text = _describe(name, error, inputs)
                    raise RewardCallError(text, _traceback(error)) from error
                log.warning(
                    "reward '%s' raised %s at step %d; it is called again in %.0f s",
                    name, _exception_text(error), inputs.step, delay,
                )  # fmt: skip
            time.sleep(wait)
            delay = min(2 * delay, MAX_DELAY)
            report(0, len(inputs))  # the watchdog must not take the wait for a hang
        raise AssertionError("the last call returns or raises")


def _describe(name: str, error: BaseException, inputs: RewardInputs) -> str:
    """One line: source, step and exception, and the response in question if it is known."""
    text = f"reward '{name}' at step {inputs.step}: {_exception_text(error)}"
    index = _response_in_hand(error, inputs)
    if index is None:
        return f"{text} (called with {len(inputs)} responses, first prompt: {_prompt(inputs, 0)})"
    response = _shown(inputs.texts[index])
    return f"{text} (response {index}, prompt: {_prompt(inputs, index)}, response: {response})"


def _prompt(inputs: RewardInputs, index: int) -> str:
    return _shown(inputs.batch.prompts[index].text)


def _shown(text: str) -> str:
    cut = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
    return repr(cut)


def _exception_text(error: BaseException) -> str:
    """Type and message on one line."""
    message = " ".join(error_text(error).split())
    if len(message) > 2 * SHOWN_CHARACTERS:
        message = message[: 2 * SHOWN_CHARACTERS - 1] + "…"
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
