"""Reward source: a Python function."""

import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from engine.config.sections.reward import RewardSource
from engine.progress import ReportProgress
from engine.train.rewards.source import LoadContext, RewardInputs, RunsOn, Score, SourceKind
from engine.train.user_code.coroutines import result_of
from engine.train.user_code.function import UserFunction


class FunctionReward:
    """A user's Python function, called as TRL's GRPO trainer calls its reward functions.

    The keyword arguments are `prompts`, `completions` (texts, or lists of chat messages for chat
    prompts), `completion_ids`, `trainer_state` (with `global_step`), and each other column of the
    data as a list; with an environment also `environments`, the user's objects. The function
    returns for each response a float, a list of floats for the turns of the policy, or None if it
    does not score it. It may be a coroutine function.
    """

    def __init__(self, source: str, path: str | None, key: str = "reward") -> None:
        """Imports the function.

        Args:
            source: `module:function`.
            path: a folder to import the module from; the working directory is searched after it.
            key: of the source in the configuration, for errors.

        Raises:
            UserInputError: the module cannot be imported, or has no such function.
        """
        self.code = UserFunction(source, path, f"{key}.function")

    def __call__(self, inputs: RewardInputs, report: ReportProgress) -> list[Score]:
        """Calls the function once for the whole batch; see :class:`Reward`."""
        with self.code.running():
            scores = self._scores(inputs)
        report(len(inputs), len(inputs))
        return scores

    def _scores(self, inputs: RewardInputs) -> list[Score]:
        scores = result_of(self.code.call(self._arguments(inputs)))
        if isinstance(scores, Tensor | np.ndarray):
            return list(scores.tolist()) if scores.ndim else [scores.item()]
        # Anything else is refused by the check of the scores, which says what it is.
        values = isinstance(scores, Iterable) and not isinstance(scores, dict | set | str)
        return list(scores) if values else scores

    @staticmethod
    def _arguments(inputs: RewardInputs) -> dict[str, Any]:
        """Builds the arguments as copies, so that the function may modify them."""
        rows = inputs.batch.prompts
        columns = {k: [copy.deepcopy(p.row.get(k)) for p in rows] for k in rows[0].row}
        prompts: list[Any] = [
            p.text if p.messages is None else copy.deepcopy(p.messages) for p in rows
        ]
        completions: list[Any] = [
            text if p.messages is None else inputs.messages(i)
            for i, (text, p) in enumerate(zip(inputs.texts, rows, strict=True))
        ]
        if inputs.turns is not None:
            columns["environments"] = [turns.environment for turns in inputs.turns]
        return columns | {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [list(ids) for ids in inputs.ids],
            "trainer_state": SimpleNamespace(global_step=inputs.step),
        }


def _load(source: RewardSource, context: LoadContext) -> FunctionReward:
    return FunctionReward(source.value, context.config.path, context.key)


KIND = SourceKind(
    runs_on=RunsOn.RANK_0,
    load=_load,
    default_name=lambda value: value.partition(":")[2],
)
