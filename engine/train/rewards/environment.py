"""Reward source: a method of the response's environment."""

import inspect

from engine.config.sections.reward import RewardSource
from engine.progress import ReportProgress
from engine.train.rewards.source import LoadContext, RewardInputs, RunsOn, SourceKind
from engine.train.user_function import forks_ended


class EnvironmentReward:
    """Calls a method of each response's environment, without arguments.

    The method returns a float, or None for a response it does not score.
    """

    def __init__(self, method: str) -> None:
        self._method = method

    def __call__(self, inputs: RewardInputs, report: ReportProgress) -> list[float | None]:
        """Calls the methods one after the other; see :class:`Reward`.

        Raises: TypeError: an environment has no such method; or whatever a method raises.
        """
        if inputs.turns is None:
            raise TypeError("these responses have no environment, as those of a probe")
        with forks_ended():
            scores = [self._score(turns.environment) for turns in inputs.turns]
        report(len(inputs), len(inputs))
        return scores

    def _score(self, environment: object) -> float | None:
        method = getattr(environment, self._method, None)
        if not callable(method) or inspect.iscoroutinefunction(method):
            raise TypeError(f"{type(environment).__name__} has no method {self._method}")
        score: float | None = method()
        return score


def _load(source: RewardSource, context: LoadContext) -> EnvironmentReward:
    del context
    return EnvironmentReward(source.value)


KIND = SourceKind(runs_on=RunsOn.RANK_0, load=_load, default_name=lambda value: value)
