"""Where a response's score comes from: one source, or the weighted sum of several."""

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.errors import RewardError
from engine.train.distributed.ranks import PeerRankError, RankGroup
from engine.train.rewards import function, model
from engine.train.rewards.source import (
    FunctionError,
    LoadContext,
    Reward,
    RewardInputs,
    RunsOn,
    SourceKind,
)
from engine.train.rollout.rollout import ReportProgress

KINDS: dict[str, SourceKind] = {"model": model.KIND, "function": function.KIND}
"""By the configuration keys of :data:`engine.config.schema.SOURCE_KEYS`."""


@dataclass(frozen=True)
class WeightedReward:
    """One source of a mix."""

    weight: float
    runs_on: RunsOn
    reward: Reward | None
    """None on the ranks that do not ask it."""


class RewardMix:
    """The weighted sum of a run's reward sources."""

    def __init__(self, sources: dict[str, WeightedReward], ranks: RankGroup) -> None:
        """`sources`: by name."""
        self._sources = sources
        self._ranks = ranks

    def __call__(
        self, answers: RewardInputs, report: ReportProgress = lambda _done, _total: None
    ) -> tuple[Tensor, dict[str, list[float | None]]]:
        """Scores (B,) float32, and each source's own.

        Raises:
            RewardError: a source returned the wrong number of scores, something that is no finite
                number, or no source had an opinion on a response.
            FunctionError: a source that rank 0 asks raised.
            PeerRankError: either, on the other ranks.
        """
        parts: dict[str, list[float | None]] = {}
        total = [0.0] * len(answers)
        heard = [False] * len(answers)
        for name, source in self._sources.items():
            scores = self._ask(name, source, answers, report)
            parts[name] = scores
            for i, score in enumerate(scores):
                if score is not None:
                    total[i] += source.weight * score
                    heard[i] = True
        if not all(heard):
            i = heard.index(False)
            raise RewardError(
                f"no reward has an opinion on answer {i} of step {answers.step} "
                f"(prompt: {answers.batch.prompts[i].text!r}): each returned None"
            )
        return torch.tensor(total, dtype=torch.float32), parts

    def _ask(
        self, name: str, source: WeightedReward, answers: RewardInputs, report: ReportProgress
    ) -> list[float | None]:
        if source.runs_on is RunsOn.RANK_0:
            return self._ask_on_rank_0(name, source.reward, answers, report)
        if source.reward is None:
            raise TypeError(f"reward '{name}' is missing on a rank")
        return self._ask_on_every_rank(name, source.reward, answers, report)

    def _ask_on_every_rank(
        self, name: str, reward: Reward, answers: RewardInputs, report: ReportProgress
    ) -> list[float | None]:
        """Each rank asks about its share; the scores come to all."""
        lengths = torch.tensor([len(ids) for ids in answers.ids])
        rows = self._ranks.strided_share(lengths.argsort(descending=True, stable=True))
        scores = torch.zeros(len(answers), dtype=torch.float64)
        scores[rows] = torch.tensor(reward(answers.select(rows), report), dtype=torch.float64)
        return validate_scores(name, self._ranks.all_reduce_sum(scores).tolist(), answers)

    def _ask_on_rank_0(
        self, name: str, reward: Reward | None, answers: RewardInputs, report: ReportProgress
    ) -> list[float | None]:
        """Rank 0 asks about all of them; what comes of it, good or bad, comes to all."""
        own: list[float | None] = []
        failure: Exception | None = None
        if reward is not None:
            try:
                own = validate_scores(name, reward(answers, report), answers)
            except RewardError as error:
                failure = error
            except Exception as error:  # raised below, once the others know
                text = f"reward '{name}' raised {type(error).__name__}: {error}"
                failure = FunctionError(text)
                failure.__cause__ = error
        mine = (own, "" if failure is None else str(failure))
        kind = tuple[list[float | None], str]
        told, problem = msgspec.msgpack.decode(
            self._ranks.broadcast_bytes(msgspec.msgpack.encode(mine)), type=kind
        )
        if failure is not None:
            raise failure
        if problem:
            raise PeerRankError(problem)
        return told


def validate_scores(name: str, scores: list[Any], answers: RewardInputs) -> list[float | None]:
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


def load_rewards(context: LoadContext) -> RewardMix:
    """Every source of the configuration, loaded. Raises UserInputError."""
    sources: dict[str, WeightedReward] = {}
    for given in context.config.sources():
        kind = KINDS[given.kind]
        runs_here = kind.runs_on is RunsOn.EVERY_RANK or context.ranks.is_lead
        reward = kind.load(given, context) if runs_here else None
        name = _unused_name(given.name or kind.default_name(given.value), sources)
        sources[name] = WeightedReward(given.weight, kind.runs_on, reward)
    return RewardMix(sources, context.ranks)


def _unused_name(name: str, taken: Container[str]) -> str:
    n = 2
    found = name
    while found in taken:
        found, n = f"{name}-{n}", n + 1
    return found
