"""Where an answer's score comes from: reward models, Python functions, and weighted mixes."""

import math
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.config.schema import RewardConfig, RewardSource
from engine.errors import RewardError
from engine.train.distributed.ranks import PeerRankError, RankGroup
from engine.train.rewards.function import FunctionError, FunctionReward
from engine.train.rewards.model import RewardModel
from engine.train.rewards.source import Reward, RewardInputs
from engine.train.rollout.rollout import ReportProgress


class RewardMix:
    """The weighted sum of a run's reward sources.

    Of several ranks each asks a reward model about its share of the answers. A function is called
    once, by rank 0, with all of them: it may compare them, count its calls or ask a service.
    """

    def __init__(self, sources: dict[str, tuple[float, Reward]], ranks: RankGroup) -> None:
        """`sources`: by name, a weight and the source."""
        self._sources = sources
        self._ranks = ranks

    @property
    def models(self) -> list[RewardModel]:
        """Those of the sources that are models."""
        return [s for _, s in self._sources.values() if isinstance(s, RewardModel)]

    def __call__(
        self, answers: RewardInputs, report: ReportProgress = lambda _done, _total: None
    ) -> tuple[Tensor, dict[str, list[float | None]]]:
        """Scores (B,) float32, and each source's own.

        Raises:
            RewardError: a source returned the wrong number of scores, something that is no finite
                number, or no source had an opinion on an answer.
            FunctionError: a function raised.
            OtherRankError: either, on the ranks that do not call functions.
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
        self, name: str, source: Reward, answers: RewardInputs, report: ReportProgress
    ) -> list[float | None]:
        ranks = self._ranks
        if not isinstance(source, RewardModel):
            return self._call(name, source, answers, report)
        lengths = torch.tensor([len(ids) for ids in answers.ids])
        rows = ranks.strided_share(lengths.argsort(descending=True, stable=True))
        scores = torch.zeros(len(answers), dtype=torch.float64)
        scores[rows] = torch.tensor(source(answers.select(rows), report), dtype=torch.float64)
        return validate_scores(name, ranks.all_reduce_sum(scores).tolist(), answers)

    def _call(
        self, name: str, source: Reward, answers: RewardInputs, report: ReportProgress
    ) -> list[float | None]:
        """Rank 0 calls the function; what comes of it, good or bad, comes to all."""
        own: list[float | None] = []
        failure: Exception | None = None
        if self._ranks.is_lead:
            try:
                own = validate_scores(name, source(answers, report), answers)
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


def load_rewards(
    config: RewardConfig, policy_vocabulary: dict[str, int], ranks: RankGroup
) -> RewardMix:
    """Every source of the configuration, loaded. Raises UserInputError."""
    sources: dict[str, tuple[float, Reward]] = {}
    for given in config.sources():
        reward: Reward
        if given.model is not None:
            reward = RewardModel(given.model, given.label, config, policy_vocabulary, ranks)
        elif ranks.is_lead:
            reward = FunctionReward(given.function or "", config.path)
        else:
            reward = _never
        sources[_free(_name(given), sources)] = (given.weight, reward)
    return RewardMix(sources, ranks)


def _never(answers: RewardInputs, report: ReportProgress) -> list[float | None]:
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
