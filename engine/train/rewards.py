"""Where an answer's score comes from: reward models, Python functions, and weighted mixes."""

import asyncio
import importlib
import inspect
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from engine.config import RewardConfig, RewardSource
from engine.errors import RewardError, UserInputError
from engine.train.data import PromptBatch
from engine.train.parallel import Team
from engine.train.reward_model import RewardModel
from engine.train.rollout import Report, Rollout


@dataclass(frozen=True)
class Answers:
    """What a reward sees of a rollout."""

    batch: PromptBatch
    ids: list[list[int]]
    """Response token ids, without padding."""
    texts: list[str]
    eos: list[bool]
    step: int

    @classmethod
    def of(cls, rollout: Rollout, step: int) -> "Answers":
        """The rollout's answers."""
        ids = [
            row[:n] for row, n in zip(rollout.ids.tolist(), rollout.lengths.tolist(), strict=True)
        ]
        return cls(rollout.batch, ids, rollout.texts, rollout.eos.tolist(), step)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Tensor) -> "Answers":
        """Some of them."""
        chosen = rows.tolist()
        return Answers(
            self.batch.select(rows),
            [self.ids[i] for i in chosen],
            [self.texts[i] for i in chosen],
            [self.eos[i] for i in chosen],
            self.step,
        )


class Reward(Protocol):
    """One source of scores."""

    def __call__(self, answers: Answers, report: Report) -> list[float | None]:
        """A score for each answer; None where this source has no opinion."""


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

    def __call__(self, answers: Answers, report: Report) -> list[float | None]:
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
    def _arguments(answers: Answers) -> dict[str, Any]:
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


class Rewards:
    """The weighted sum of a run's reward sources.

    Of several ranks each asks a reward model about its share of the answers. A function is called
    once, by rank 0, with all of them: it may compare them, count its calls or ask a service.
    """

    def __init__(self, sources: dict[str, tuple[float, Reward]], team: Team) -> None:
        """`sources`: by name, a weight and the source."""
        self._sources = sources
        self._team = team

    @property
    def models(self) -> list[RewardModel]:
        """Those of the sources that are models."""
        return [s for _, s in self._sources.values() if isinstance(s, RewardModel)]

    def __call__(
        self, answers: Answers, report: Report = lambda _done, _total: None
    ) -> tuple[Tensor, dict[str, list[float | None]]]:
        """Scores (B,) float32, and each source's own.

        Raises:
            RewardError: a source returned the wrong number of scores, something that is no finite
                number, or no source had an opinion on an answer.
        """
        parts: dict[str, list[float | None]] = {}
        total = [0.0] * len(answers)
        heard = [False] * len(answers)
        for name, (weight, source) in self._sources.items():
            scores = self._ask(name, source, answers, report)
            parts[name] = scores
            for i, score in enumerate(scores):
                if score is not None:
                    total[i] += weight * score
                    heard[i] = True
        if not all(heard):
            i = heard.index(False)
            raise RewardError(
                f"no reward has an opinion on answer {i} of step {answers.step} "
                f"(prompt: {answers.batch.prompts[i].text!r}): each returned None"
            )
        return torch.tensor(total, dtype=torch.float32), parts

    def _ask(
        self, name: str, source: Reward, answers: Answers, report: Report
    ) -> list[float | None]:
        team = self._team
        if not isinstance(source, RewardModel):
            own = checked(name, source(answers, report), answers) if team.lead else []
            told: list[float | None] = msgspec.msgpack.decode(
                team.tell(msgspec.msgpack.encode(own))
            )
            return told
        lengths = torch.tensor([len(ids) for ids in answers.ids])
        rows = team.deal(lengths.argsort(descending=True, stable=True))
        scores = torch.zeros(len(answers), dtype=torch.float64)
        scores[rows] = torch.tensor(source(answers.select(rows), report), dtype=torch.float64)
        return checked(name, team.merge(scores).tolist(), answers)


def checked(name: str, scores: list[Any], answers: Answers) -> list[float | None]:
    """The scores as floats. Raises RewardError."""
    if len(scores) != len(answers):
        raise RewardError(
            f"reward '{name}' returned {len(scores)} scores for {len(answers)} answers at step "
            f"{answers.step}: it must return one for each"
        )
    numbers: list[float | None] = []
    for i, score in enumerate(scores):
        try:
            number = None if score is None else float(score)
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise RewardError(
                f"reward '{name}' returned {score!r} for answer {i} of step {answers.step} "
                f"(prompt: {answers.batch.prompts[i].text!r}, answer: {answers.texts[i]!r}): "
                "it must be a finite number, or None for no opinion"
            )
        numbers.append(number)
    return numbers


def load_rewards(config: RewardConfig, policy_vocabulary: dict[str, int], team: Team) -> Rewards:
    """Every source of the configuration, loaded. Raises UserInputError."""
    sources: dict[str, tuple[float, Reward]] = {}
    for given in config.sources():
        reward: Reward
        if given.model is not None:
            reward = RewardModel(given.model, given.label, config, policy_vocabulary, team)
        elif team.lead:
            reward = FunctionReward(given.function or "", config.path)
        else:
            reward = _never
        sources[_free(_name(given), sources)] = (given.weight, reward)
    return Rewards(sources, team)


def _never(answers: Answers, report: Report) -> list[float | None]:
    """In a function's place on the ranks that do not call it."""
    raise RewardError("a reward function is rank 0's to call")


def _name(source: RewardSource) -> str:
    if source.name:
        return source.name
    if source.function:
        return source.function.partition(":")[2]
    return (source.model or "").rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]


def _free(name: str, taken: dict[str, Any]) -> str:
    n = 2
    found = name
    while found in taken:
        found, n = f"{name}-{n}", n + 1
    return found


@dataclass
class Normaliser:
    """Turns raw scores into those that are trained on; kept in the checkpoint."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, scores: Tensor) -> "Normaliser":
        """From reference samples' scores (n,). Raises RewardError where they do not vary."""
        std = float(scores.std(correction=0))
        if std < 1e-8:
            raise RewardError(
                "reward.normalise: reference needs scores that vary, but every reference answer "
                f"got {float(scores[0]):g}: use reward.normalise: none"
            )
        return cls(float(scores.mean()), std)

    def __call__(self, raw: Tensor, config: RewardConfig, ended: Tensor) -> Tensor:
        """Normalised, clipped, then less the penalty for answers that were cut off; (B,)."""
        scores = (raw - self.mean) / self.std
        if config.clip is not None:
            scores = scores.clamp(-config.clip, config.clip)
        if config.missing_eos_penalty:
            scores = scores - config.missing_eos_penalty * (~ended).to(scores.dtype)
        return scores
