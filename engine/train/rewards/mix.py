"""The score of a response: the weighted sum of one or more reward sources."""

import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from engine.config.sections.reward import RewardSource
from engine.examined import examined
from engine.progress import ReportProgress, report_nothing
from engine.train.data.prompts import Prompt
from engine.train.distributed.compute_on_rank_0 import compute_on_rank_0
from engine.train.distributed.ranks import RankGroup
from engine.train.rewards.calls import MAX_DELAY, SourceCall, allow_reload, retry_delays
from engine.train.rewards.kinds import environment, function, judge, model, service
from engine.train.rewards.normalise import Scale, group_scales
from engine.train.rewards.scores import shown_prompt, validate_scores
from engine.train.rewards.source import (
    AsksEarly,
    LoadContext,
    Reward,
    RewardCallError,
    RewardInputs,
    RunsOn,
    Score,
    SourceKind,
    whole,
)

log = logging.getLogger("engine")

T = TypeVar("T")

KINDS: dict[str, SourceKind] = {
    "model": model.KIND,
    "function": function.KIND,
    "service": service.KIND,
    "judge": judge.KIND,
    "environment": environment.KIND,
}
"""By the configuration keys of :data:`engine.config.sections.reward.SOURCE_KEYS`."""


@dataclass(frozen=True)
class WeightedReward:
    """One source of a mix."""

    weight: float
    runs_on: RunsOn
    reward: Reward | None
    """None on ranks that do not call it."""
    normalised: bool = False
    """Whether the source's own `normalise` is `reference`."""
    in_groups: bool = False
    """Whether it is `group`."""
    remote: bool = False
    """See :attr:`SourceKind.remote`."""


@dataclass(frozen=True)
class Scores:
    """The scores of B responses by a mix."""

    total: Tensor
    """(B,) float32: the weighted sum."""
    parts: dict[str, list[float | None]]
    """The scores of each source, by name; None for a response that it does not score."""
    turns: dict[str, list[list[float] | None]]
    """The scores of each source for the turns of a response, by name; None for a response whose
    turns it does not score."""

    def turns_of(self, row: int) -> dict[str, list[float]]:
        """The scores of a response's turns, by the sources that gave them."""
        found = {name: scores[row] for name, scores in self.turns.items()}
        return {name: scores for name, scores in found.items() if scores is not None}

    def replaced(self, rows: Tensor, other: "Scores", other_rows: Tensor) -> "Scores":
        """Returns scores with some rows taken from others; both row indices are (n,) int64."""

        def mixed(own: Mapping[str, list[T]], others: Mapping[str, list[T]]) -> dict[str, list[T]]:
            found = {name: list(scores) for name, scores in own.items()}
            for row, other_row in zip(rows.tolist(), other_rows.tolist(), strict=True):
                for name, scores in found.items():
                    scores[row] = others[name][other_row]
            return found

        return Scores(
            self.total.index_copy(0, rows, other.total[other_rows]),
            mixed(self.parts, other.parts),
            mixed(self.turns, other.turns),
        )


class RewardMix:
    """The weighted sum of a run's reward sources. All ranks must call it together."""

    def __init__(
        self, sources: dict[str, WeightedReward], ranks: RankGroup, retries: int = 0
    ) -> None:
        self._sources = sources
        self._ranks = ranks
        self._retries = retries
        self.scales: dict[str, Scale] = {}
        """Source → mean and standard deviation of its scores over responses of the reference, for
        the sources of :attr:`normalised`. Set by the loader; part of a checkpoint."""

    @property
    def normalised(self) -> list[str]:
        """The names of the sources with their own normalisation."""
        return [name for name, source in self._sources.items() if source.normalised]

    def model_scale(self) -> tuple[float, Scale]:
        """Weight and scale of the first source that runs on every rank: a reward model."""
        name, source = next(
            (n, s) for n, s in self._sources.items() if s.runs_on is RunsOn.EVERY_RANK
        )
        return source.weight, self.scales.get(name, (0.0, 1.0))

    def reward_model(self) -> model.RewardModel:
        """The first source that is a reward model. Raises TypeError if there is none."""
        for source in self._sources.values():
            if isinstance(source.reward, model.RewardModel):
                return source.reward
        raise TypeError("no reward source is a reward model")

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return list(self._sources)

    def __call__(
        self,
        inputs: RewardInputs,
        report: ReportProgress = report_nothing,
        *,
        retry: bool = True,
    ) -> Scores:
        """Scores all responses of a step; a None score adds nothing to the sum.

        Remote sources are called together, while this process calls the other ones.

        Args:
            inputs: B responses.
            report: see :class:`Reward`.
            retry: whether a source of rank 0 that raises is called again, `reward.retries` times.

        Raises:
            RewardError: a source that runs on every rank returned a score that is not a finite
                number.
            RewardCallError: a source that runs on rank 0 raised in every call, or returned the
                wrong number of scores or one that is not a finite number; or every source whose
                weight is not 0 returned None for a response.
        """
        begun = self._begin_remote(inputs)
        order = sorted(self._sources, key=lambda name: self._sources[name].remote)
        try:
            found = {
                name: self.source_scores(name, inputs, report, retry=retry, begun=begun.get(name))
                for name in order
            }
        finally:  # another source may have failed
            for call in begun.values():
                call.abandon()
        parts = {name: [whole(score) for score in found[name]] for name in self._sources}
        turns = {
            name: [score if isinstance(score, list) else None for score in found[name]]
            for name in self._sources
        }
        return Scores(self.total(parts, inputs), parts, turns)

    @property
    def ask_early(self) -> Callable[[Prompt, str], None] | None:
        """Asks sources about single responses, before they are called with all; None without any.

        Called with a prompt and the text of a response to it.
        """
        rewards: list[object] = [source.reward for source in self._sources.values()]
        early = [r for r in rewards if isinstance(r, AsksEarly)]
        if not early:
            return None

        def ask(prompt: Prompt, text: str) -> None:
            for reward in early:
                reward.ask_early(prompt, text)

        return ask

    def _begin_remote(self, inputs: RewardInputs) -> dict[str, SourceCall]:
        """Begins the calls of the remote sources; there are none on ranks other than 0."""
        begun: dict[str, SourceCall] = {}
        for name, source in self._sources.items():
            if source.remote and source.reward is not None:
                begun[name] = SourceCall(name, source.reward, inputs)
                begun[name].begin()
        return begun

    def total(
        self,
        parts: dict[str, list[float | None]],
        inputs: RewardInputs,
        *,
        per_prompt: int | None = None,
    ) -> Tensor:
        """The weighted sum of each source's scores, scaled by :attr:`scales`; (B,) float32.

        Args:
            parts: each source's B scores.
            inputs: the B responses.
            per_prompt: the number of responses to each prompt, to normalise within groups the
                scores of the sources that ask for it; None leaves these as they are.

        Raises:
            RewardCallError: every source whose weight is not 0 returned None for a response.
        """
        total = [0.0] * len(inputs)
        scored = [False] * len(inputs)
        for name, source in self._sources.items():
            scales = self._row_scales(name, parts[name], per_prompt)
            for i, (score, (mean, std)) in enumerate(zip(parts[name], scales, strict=True)):
                if score is not None and source.weight:
                    total[i] += source.weight * ((score - mean) / std)
                    scored[i] = True
        if not all(scored):
            i = scored.index(False)
            for source in self._sources.values():
                allow_reload(source.reward)
            raise RewardCallError(
                f"no reward source scored response {i} of step {inputs.step} "
                f"(prompt: {shown_prompt(inputs, i)}): each returned None or has weight 0",
                retry=False,
            )
        return torch.tensor(total, dtype=torch.float32)

    def turn_totals(self, scores: Scores, *, per_prompt: int | None = None) -> list[list[float]]:
        """The weighted sum of the sources' scores of each turn, scaled as :meth:`total`.

        Means are not subtracted: they belong to the response as a whole.

        Args:
            scores: of B responses.
            per_prompt: as for :meth:`total`.

        Returns:
            One list for each of the B responses; empty if no source scored its turns.
        """
        totals: list[list[float]] = [[] for _ in scores.total]
        for name, rows in scores.turns.items():
            weight = self._sources[name].weight
            scales = self._row_scales(name, scores.parts[name], per_prompt)
            for i, (turns, (_, std)) in enumerate(zip(rows, scales, strict=True)):
                if turns is not None:
                    before = totals[i] or [0.0] * len(turns)
                    totals[i] = [t + weight * (s / std) for t, s in zip(before, turns, strict=True)]
        return totals

    def _row_scales(
        self, name: str, scores: list[float | None], per_prompt: int | None
    ) -> list[Scale]:
        """Mean and standard deviation with which to scale each of a source's B scores."""
        if per_prompt is not None and self._sources[name].in_groups:
            return group_scales(scores, per_prompt)
        return [self.scales.get(name, (0.0, 1.0))] * len(scores)

    def source_scores(
        self,
        name: str,
        inputs: RewardInputs,
        report: ReportProgress = report_nothing,
        *,
        retry: bool = True,
        begun: SourceCall | None = None,
    ) -> list[Score]:
        """The B scores of one source, whose call may have begun.

        Raises what calling the mix raises.
        """
        source = self._sources[name]
        if source.runs_on is RunsOn.RANK_0:
            call = begun
            if call is None and source.reward is not None:
                call = SourceCall(name, source.reward, inputs)
            return self._score_on_rank_0(call, report, len(inputs), retry=retry)
        if source.reward is None:
            raise TypeError(f"reward source '{name}' is not loaded on this rank")
        return self._score_on_every_rank(name, source.reward, inputs, report)

    def _score_on_every_rank(
        self,
        name: str,
        reward: Reward,
        inputs: RewardInputs,
        report: ReportProgress,
    ) -> list[Score]:
        # Sorted by length, so that the ranks' shares take about the same time.
        lengths = torch.tensor([len(ids) for ids in inputs.ids])
        rows = self._ranks.strided_share(lengths.argsort(descending=True, stable=True))
        scores = torch.zeros(len(inputs), dtype=torch.float64)
        found = reward(inputs.select(rows), report)
        scores[rows] = torch.tensor(found, dtype=torch.float64)
        return validate_scores(name, self._ranks.all_reduce_sum(scores).tolist(), inputs)

    def _score_on_rank_0(
        self, call: SourceCall | None, report: ReportProgress, count: int, *, retry: bool
    ) -> list[Score]:
        """Calls a source on rank 0, again if it raises.

        The ranks synchronise after each call and each report, so that none waits in a collective,
        or stays silent, for longer than rank 0 itself.

        Args:
            call: None on ranks other than 0.
            report: called on every rank.
            count: number of responses.
            retry: whether to call it again.
        """
        delays = retry_delays(self._retries if retry else 0)
        while True:
            try:
                return self._call_on_rank_0(call, report, count)
            except RewardCallError as error:
                delay = next(delays, None) if error.retry else None
                if delay is None:
                    raise
                delay = max(delay, min(error.retry_after, MAX_DELAY))
                if call is not None:
                    log.warning("%s; it is called again in %.0f s", error, delay)
            time.sleep(delay)
            report(0, count)

    def _call_on_rank_0(
        self, call: SourceCall | None, report: ReportProgress, count: int
    ) -> list[Score]:
        """Calls the source once; broadcasts its scores, or raises its error on every rank.

        Args:
            call: None on ranks other than 0.
            report: called on every rank.
            count: number of responses.
        """
        failure: RewardCallError | None = None

        def compute(others_wait: Callable[[], None]) -> bytes:
            nonlocal failure

            def reported(done: int, total: int) -> None:
                report(done, total)
                others_wait()

            outcome = _Outcome()
            try:
                outcome = _Outcome(scores=[] if call is None else call(reported))
            except RewardCallError as error:  # raised below, once the other ranks know
                failure = error
                outcome = _Outcome(
                    raised=str(error), trace=error.trace, recovers=error.recovers,
                    retry_after=error.retry_after, retry=error.retry,
                )  # fmt: skip
            return msgspec.msgpack.encode(outcome)

        data = compute_on_rank_0(self._ranks, compute, lambda: report(0, count))
        outcome = msgspec.msgpack.decode(data, type=examined(_Outcome))
        if failure is not None:
            raise failure
        if outcome.raised:
            raise RewardCallError(
                outcome.raised, outcome.trace, recovers=outcome.recovers,
                retry_after=outcome.retry_after, retry=outcome.retry,
            )  # fmt: skip
        return outcome.scores


class _Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a source, sent by rank 0."""

    scores: list[Score] = []
    raised: str = ""
    trace: str = ""
    recovers: bool = False
    retry_after: float = 0.0
    retry: bool = True


def load_rewards(
    context: LoadContext,
    configured: Iterable[RewardSource] | None = None,
    taken: Iterable[str] = (),
) -> RewardMix:
    """Loads reward sources, each on the ranks that call it.

    Args:
        context: the run.
        configured: those of `eval.rewards`. Default: those of the section `reward`.
        taken: names of other sources.

    Raises:
        UserInputError: a source cannot be loaded.
    """
    sources: dict[str, WeightedReward] = {}
    given = context.config.sources() if configured is None else list(configured)
    numbered = "eval.rewards" if configured is not None else "reward.mix" if len(given) > 1 else ""
    for i, source in enumerate(given):
        context = replace(context, key=f"{numbered}[{i}]" if numbered else "reward")
        kind = KINDS[source.kind]
        runs_here = kind.runs_on is RunsOn.EVERY_RANK or context.ranks.is_lead
        reward = kind.load(source, context) if runs_here else None
        name = source.name or kind.default_name(source.value)
        name = _unused_name(name, [*sources, *taken])
        sources[name] = WeightedReward(
            source.weight, kind.runs_on, reward,
            normalised=source.normalise == "reference", in_groups=source.normalise == "group",
            remote=kind.remote,
        )  # fmt: skip
    return RewardMix(sources, context.ranks, context.config.retries)


def _unused_name(name: str, taken: Container[str]) -> str:
    n, candidate = 2, name
    while candidate in taken:
        candidate, n = f"{name}-{n}", n + 1
    return candidate
