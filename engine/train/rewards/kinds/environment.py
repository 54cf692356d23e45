"""Reward source: a method of the response's environment."""

import logging

from engine.config.sections.reward import RewardSource
from engine.errors import UserInputError
from engine.progress import ReportProgress
from engine.train.rewards.scores import shown
from engine.train.rewards.source import LoadContext, RewardInputs, RunsOn, Score, SourceKind
from engine.train.user_code.concurrent_calls import ConcurrentCalls, call_each
from engine.train.user_code.coroutines import result_of
from engine.train.user_code.function import UserFunction

log = logging.getLogger("engine")


class EnvironmentReward:
    """Calls a method of each response's environment, without arguments.

    The method returns a float, a list of floats for the turns of the policy, or None for a response
    it does not score.
    """

    def __init__(self, method: str, factory: UserFunction, timeout: float) -> None:
        """Stores the arguments.

        Args:
            method: its name.
            factory: what makes the environments.
            timeout: seconds that a call may take.
        """
        self._method, self.code, self._timeout = method, factory, timeout

    def __call__(self, inputs: RewardInputs, report: ReportProgress) -> list[Score]:
        """Calls the methods one after the other; see :class:`Reward`.

        Raises:
            TypeError: there are no environments.
            CallTimeoutError: a method has not returned in time.
            Exception: what a method raises.
        """
        if inputs.turns is None:
            raise TypeError("these responses have no environment")
        environments, texts = [turns.environment for turns in inputs.turns], inputs.texts

        def takes_long(i: int, seconds: float) -> None:
            log.warning(
                "%s of an environment at step %d has not returned for %.0f s (called for %s)",
                self._method, inputs.step, seconds, shown(texts[i]),
            )  # fmt: skip

        with self.code.running():
            scores = call_each(
                lambda i: self._score(environments[i], texts[i]), len(inputs),
                waits=lambda: report(0, len(inputs)),
                calls=ConcurrentCalls(
                    concurrency=1, limit=self._timeout, quoted=lambda i: shown(texts[i]),
                    takes_long=takes_long,
                ),
            )  # fmt: skip
        report(len(inputs), len(inputs))
        return scores

    def _score(self, environment: object, response: str) -> Score:
        """Scores a response.

        Its text is here for the description of an error, which looks for it in the traceback.
        """
        score: Score = result_of(getattr(environment, self._method)())
        return score


def _load(source: RewardSource, context: LoadContext) -> EnvironmentReward:
    if context.environment is None:
        raise UserInputError(f"{context.key}.environment needs environment.factory")
    return EnvironmentReward(source.value, context.environment, context.environment_timeout)


KIND = SourceKind(runs_on=RunsOn.RANK_0, load=_load, default_name=lambda value: value)
