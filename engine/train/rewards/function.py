"""A Python function as a reward source."""

import asyncio
import importlib
import inspect
import sys
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from engine.config.schema import RewardSource
from engine.errors import UserInputError
from engine.train.rewards.source import LoadContext, RewardInputs, RunsOn, SourceKind
from engine.train.rollout.rollout import ReportProgress


class FunctionReward:
    """A user's Python function, called as TRL calls its reward functions.

    By keyword: `prompts`, `completions` (texts, or lists of chat messages for chat prompts),
    `completion_ids`, `trainer_state` (with `global_step`), and each other column of the data as a
    list. It returns one float, or None for no opinion, an answer. It may be a coroutine function.
    """

    def __init__(self, source: str, path: str | None) -> None:
        """Imports `module:function`. Raises UserInputError."""
        module_name, _, name = source.partition(":")
        for folder in (path, "."):
            if folder and folder not in sys.path:
                sys.path.insert(0, folder)
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            # Anything may go wrong inside a user's module; it is theirs to see, on one line.
            raise UserInputError(
                f"reward.function: cannot import '{module_name}' (looked in {path or '.'}): "
                f"{type(error).__name__}: {error}"
            ) from error
        function = getattr(module, name, None)
        if not callable(function):
            raise UserInputError(
                f"reward.function: module '{module_name}' has no function '{name}'"
            )
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes = {p.name for p in parameters}

    def __call__(self, answers: RewardInputs, report: ReportProgress) -> list[float | None]:
        """Calls it once for the whole batch."""
        given = self._arguments(answers)
        if not self._takes_all:
            given = {k: v for k, v in given.items() if k in self._takes}
        scores = self._function(**given)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_result_of(scores))
        report(len(answers), len(answers))
        return scores.tolist() if isinstance(scores, Tensor) else list(scores)

    @staticmethod
    def _arguments(answers: RewardInputs) -> dict[str, Any]:
        rows = answers.batch.prompts
        columns = {k: [p.row.get(k) for p in rows] for k in rows[0].row}
        prompts: list[Any] = [p.text if p.messages is None else p.messages for p in rows]
        completions: list[Any] = [
            text if p.messages is None else [{"role": "assistant", "content": text}]
            for text, p in zip(answers.texts, rows, strict=True)
        ]
        return columns | {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": answers.ids,
            "trainer_state": SimpleNamespace(global_step=answers.step),
        }


async def _result_of(awaitable: Any) -> Any:
    return await awaitable


def _load(given: RewardSource, context: LoadContext) -> FunctionReward:
    return FunctionReward(given.value, context.config.path)


KIND = SourceKind(
    runs_on=RunsOn.RANK_0,
    load=_load,
    default_name=lambda value: value.partition(":")[2],
)
