"""The score of a response: the weighted sum of one or more reward sources."""

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.config.schema import RewardSource
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
"""Kinds of sources, by the configuration keys of :data:`engine.config.schema.SOURCE_KEYS`."""


@dataclass(frozen=True)
class WeightedReward:
    """One source of a mix."""

    weight: float
    runs_on: RunsOn
    reward: Reward | None
    """None on ranks that do not call it."""


class RewardMix:
    """The weighted sum of a run's reward sources. All ranks call it together."""

    def __init__(self, sources: dict[str, WeightedReward], ranks: RankGroup) -> None:
        self._sources = sources
        self._ranks = ranks

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return list(self._sources)

    def __call__(
        self, inputs: RewardInputs, report: ReportProgress = lambda _done, _total: None
    ) -> tuple[Tensor, dict[str, list[float | None]]]:
        """Scores all responses of a step; a None score adds nothing to the sum.

        Returns:
            Scores (B,) float32, and each source's B scores, by name.

        Raises:
            RewardError: a source returned the wrong number of scores or one that is not a finite
                number, or every source returned None for a response.
            FunctionError: a source that runs on rank 0 raised.
            PeerRankError: either of these on rank 0, raised on the other ranks.
        """
        parts = self.parts(inputs, report)
        total = [0.0] * len(inputs)
        scored = [False] * len(inputs)
        for name, source in self._sources.items():
            for i, score in enumerate(parts[name]):
                if score is not None:
                    total[i] += source.weight * score
                    scored[i] = True
        if not all(scored):
            i = scored.index(False)
            raise RewardError(
                f"no reward source scored response {i} of step {inputs.step} "
                f"(prompt: {inputs.batch.prompts[i].text!r}): each returned None"
            )
        return torch.tensor(total, dtype=torch.float32), parts

    def parts(
        self, inputs: RewardInputs, report: ReportProgress = lambda _done, _total: None
    ) -> dict[str, list[float | None]]:
        """The B scores of each source, by name. Raises what calling the mix raises."""
        return {
            name: self._score(name, source, inputs, report)
            for name, source in self._sources.items()
        }

    def _score(
        self, name: str, source: WeightedReward, inputs: RewardInputs, report: ReportProgress
    ) -> list[float | None]:
        if source.runs_on is RunsOn.RANK_0:
            return self._score_on_rank_0(name, source.reward, inputs, report)
        if source.reward is None:
            raise TypeError(f"reward source '{name}' is not loaded on this rank")
        return self._score_on_every_rank(name, source.reward, inputs, report)

    def _score_on_every_rank(
        self, name: str, reward: Reward, inputs: RewardInputs, report: ReportProgress
    ) -> list[float | None]:
        # Sorted by length, so that the ranks' shares take about the same time.
        lengths = torch.tensor([len(ids) for ids in inputs.ids])
        rows = self._ranks.strided_share(lengths.argsort(descending=True, stable=True))
        scores = torch.zeros(len(inputs), dtype=torch.float64)
        scores[rows] = torch.tensor(reward(inputs.select(rows), report), dtype=torch.float64)
        return validate_scores(name, self._ranks.all_reduce_sum(scores).tolist(), inputs)

    def _score_on_rank_0(
        self, name: str, reward: Reward | None, inputs: RewardInputs, report: ReportProgress
    ) -> list[float | None]:
        """Calls the source on rank 0; broadcasts its scores, or raises its error on every rank."""
        scores: list[float | None] = []
        failure: Exception | None = None
        if reward is not None:
            try:
                scores = validate_scores(name, reward(inputs, report), inputs)
            except RewardError as error:
                failure = error
            except Exception as error:  # raised below, once the other ranks know
                text = f"reward '{name}' raised {type(error).__name__}: {error}"
                failure = FunctionError(text)
                failure.__cause__ = error
        outcome = (scores, "" if failure is None else str(failure))
        kind = tuple[list[float | None], str]
        scores, problem = msgspec.msgpack.decode(
            self._ranks.broadcast_bytes(msgspec.msgpack.encode(outcome)), type=kind
        )
        if failure is not None:
            raise failure
        if problem:
            raise PeerRankError(problem)
        return scores


def validate_scores(name: str, scores: list[Any], inputs: RewardInputs) -> list[float | None]:
    """Converts a source's scores to floats.

    Raises:
        RewardError: there is not one score per response, or one is neither None nor finite.
    """
    if len(scores) != len(inputs):
        raise RewardError(
            f"reward '{name}' returned {len(scores)} scores for {len(inputs)} responses at step "
            f"{inputs.step}: it must return one for each"
        )
    numbers: list[float | None] = []
    for i, score in enumerate(scores):
        try:
            number = None if score is None else float(score)
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise RewardError(
                f"reward '{name}' returned {score!r} for response {i} of step {inputs.step} "
                f"(prompt: {inputs.batch.prompts[i].text!r}, response: {inputs.texts[i]!r}): "
                "a score is a finite number, or None if the source does not score the response"
            )
        numbers.append(number)
    return numbers


def load_rewards(
    context: LoadContext,
    configured: Iterable[RewardSource] | None = None,
    taken: Iterable[str] = (),
) -> RewardMix:
    """Loads reward sources, each on the ranks that call it.

    Args:
        context: the run.
        configured: the sources. Default: those of the section `reward`.
        taken: names of other sources.

    Raises:
        UserInputError: a source cannot be loaded.
    """
    sources: dict[str, WeightedReward] = {}
    for source in context.config.sources() if configured is None else configured:
        kind = KINDS[source.kind]
        runs_here = kind.runs_on is RunsOn.EVERY_RANK or context.ranks.is_lead
        reward = kind.load(source, context) if runs_here else None
        name = source.name or kind.default_name(source.value)
        name = _unused_name(name, [*sources, *taken])
        sources[name] = WeightedReward(source.weight, kind.runs_on, reward)
    return RewardMix(sources, context.ranks)


def _unused_name(name: str, taken: Container[str]) -> str:
    n, candidate = 2, name
    while candidate in taken:
        candidate, n = f"{name}-{n}", n + 1
    return candidate
