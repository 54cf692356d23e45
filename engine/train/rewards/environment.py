"""Reward source: a method of the response's environment."""

from engine.config.sections.reward import RewardSource
from engine.errors import UserInputError
from engine.progress import ReportProgress
from engine.train.rewards.source import LoadContext, RewardInputs, RunsOn, Score, SourceKind
from engine.train.user_function import UserFunction


class EnvironmentReward:
    """Calls a method of each response's environment, without arguments.

    The method returns a float, a list of floats for the turns of the policy, or None for a response
    it does not score.
    """

    def __init__(self, method: str, factory: UserFunction) -> None:
        """Stores the arguments; `factory` is what makes the environments."""
        self._method, self._factory = method, factory

    def __call__(self, inputs: RewardInputs, report: ReportProgress) -> list[Score]:
        """Calls the methods one after the other; see :class:`Reward`.

        Raises: TypeError: there are no environments; or whatever a method raises.
        """
        if inputs.turns is None:
            raise TypeError("these responses have no environment")
        with self._factory.running():
            scores = [
                self._score(turns.environment, text)
                for turns, text in zip(inputs.turns, inputs.texts, strict=True)
            ]
        report(len(inputs), len(inputs))
        return scores

    def _score(self, environment: object, response: str) -> Score:
        """Scores a response.

        Its text is here for the description of an error, which looks for it in the traceback.
        """
        score: Score = getattr(environment, self._method)()
        return score


def _load(source: RewardSource, context: LoadContext) -> EnvironmentReward:
    if context.environment is None:
        raise UserInputError(f"{context.key}.environment needs environment.factory")
    return EnvironmentReward(source.value, context.environment)


KIND = SourceKind(runs_on=RunsOn.RANK_0, load=_load, default_name=lambda value: value)
