"""Evaluates the policy on held-out prompts.

An evaluation depends only on the weights and the configuration: it uses its own fixed random
streams and leaves no trace in the run. So evaluating a checkpoint reproduces the numbers from the
run at that step.
"""

import itertools
import math
import time
from collections.abc import Container
from dataclasses import dataclass, field

import msgspec
from torch import Tensor

from engine import metrics as names
from engine.errors import RewardError, RlhfError
from engine.progress import ReportProgress
from engine.protocol.rank_messages import Sample
from engine.train.data.prompts import Prompt
from engine.train.data.randomness import derived_seed
from engine.train.evaluation.held_out import HeldOut
from engine.train.experience.respond import respond
from engine.train.experience.scoring import scores_for_training
from engine.train.ppo import masked
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.ppo.metrics import distinct_2
from engine.train.rewards.mix import RewardMix, Scores
from engine.train.rewards.source import RewardCallError, RewardInputs, whole
from engine.train.rollout.backend import GREEDY_TEMPERATURE, SamplingOptions
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run

RECORDED_BYTES = 8_000_000
"""Most bytes of recorded responses with their prompts. A message contains those of a step and of an
evaluation."""
RECORDED_TOKENS = 600_000
"""Most tokens of the responses that are recorded with per-token arrays: 30 MB of a message's 64,
and the bytes of their texts once more."""
KL_TEMPERATURE = 1.0
"""The temperature of the log-probabilities under both models: a constant, so that a change of
`rollout.temperature` during the run does not move the curve."""


AVERAGED = {
    names.EVAL_SCORE: names.EVAL_EMA_SCORE,
    names.EVAL_SCORE_CI: names.EVAL_EMA_SCORE_CI,
    names.EVAL_KL: names.EVAL_EMA_KL,
    names.EVAL_LENGTH: names.EVAL_EMA_LENGTH,
}
"""Metric of the policy → that of its average."""


REWARD_FAILURES = (RewardCallError, RewardError)
"""Errors that a failed reward source raises on all ranks."""


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation; empty at steps without one."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    """All responses, without per-token arrays; none on ranks other than 0."""
    failed: dict[str, RlhfError] = field(default_factory=dict)
    """The sources of `eval.rewards` without metrics, each with its last error."""

    def check(self) -> None:
        """Raises the error of the first source that failed, if one did."""
        for error in self.failed.values():
            raise error


@dataclass(frozen=True)
class _Scored:
    """The responses to a part of the prompts."""

    rollout: Rollout
    scores: Tensor
    """(B,) float32, as for training."""
    kl: Tensor
    """(B,) float32: nats per response."""
    parts: dict[str, list[float | None]]
    raw: Scores
    """By the sources of the training, as these gave them."""


def evaluate_if_due(run: Run, step: int) -> Evaluation:
    """Evaluates after a step if `eval.every` says so; step 0 is before the first step."""
    every = run.config.eval.every
    if run.held_out is None or not every or step % every:
        return Evaluation()
    return evaluate(run, run.held_out, step)


def evaluate(run: Run, held_out: HeldOut, step: int) -> Evaluation:
    """Generates, scores and summarises responses to held-out prompts; all ranks must call it.

    With `train.ema` the averaged policy is also evaluated, using only the training rewards; only
    its metrics are kept.

    A source of `eval.rewards` that fails is not called again, and has no metrics.

    Args:
        run: the run; it is not changed.
        held_out: the prompts and reward sources.
        step: the last finished step, for reward functions and progress.

    Raises:
        RewardCallError, RewardError: a reward of the training failed.
    """
    started = time.perf_counter()
    eval_rewards = _EvalRewards(held_out.rewards)
    parts = _respond_to_all(run, held_out, step, step, eval_rewards)
    metrics = _summarise(parts, run.config.eval.per_prompt, eval_rewards.failed)
    if run.average is not None:
        with run.average.in_place_of(run.policy):
            # A separate version, so that a rollout engine does not mistake these weights for the
            # policy's.
            averaged = _respond_to_all(run, held_out, step, -1 - step, _EvalRewards(None))
        found = _summarise(averaged, run.config.eval.per_prompt)
        metrics |= {AVERAGED[name]: found[name] for name in AVERAGED if name in found}
    metrics[names.EVAL_TIME] = time.perf_counter() - started
    samples = _samples(parts) if run.ranks.is_lead else []
    return Evaluation(metrics, samples, eval_rewards.failed)


class _EvalRewards:
    """The sources of `eval.rewards` during one evaluation."""

    def __init__(self, rewards: RewardMix | None) -> None:
        self._rewards = rewards
        self.failed: dict[str, RlhfError] = {}

    def parts(self, inputs: RewardInputs, report: ReportProgress) -> dict[str, list[float | None]]:
        """Returns each source's B scores; all None from the point where it has failed."""
        found: dict[str, list[float | None]] = {}
        if self._rewards is None:
            return found
        for name in self._rewards.names:
            found[name] = [None] * len(inputs)
            if name in self.failed:
                continue
            try:
                scores = self._rewards.source_scores(name, inputs, report)
            except REWARD_FAILURES as error:
                self.failed[name] = error
            else:
                found[name] = [whole(score) for score in scores]
        return found


def _respond_to_all(
    run: Run, held_out: HeldOut, step: int, weights_version: int, eval_rewards: _EvalRewards
) -> list[_Scored]:
    report = run.announce(step, names.EVALUATE)
    return [
        _respond(run, eval_rewards, step, weights_version, number, prompts, report)
        for number, prompts in enumerate(_batches(run, held_out.prompts))
    ]


def _batches(run: Run, prompts: list[Prompt]) -> list[list[Prompt]]:
    """Splits the prompts into parts of nearly equal size, with at most a step's responses each.

    No part has fewer prompts than there are ranks, since each rank needs one.
    """
    config = run.config
    most = max(run.ranks.size, config.rollout.batch_size // config.eval.per_prompt)
    count = min(math.ceil(len(prompts) / most), max(1, len(prompts) // run.ranks.size))
    bounds = [len(prompts) * i // count for i in range(count + 1)]
    return [prompts[a:b] for a, b in itertools.pairwise(bounds)]


def _respond(
    run: Run,
    eval_rewards: _EvalRewards,
    step: int,
    weights_version: int,
    number: int,
    prompts: list[Prompt],
    report: ReportProgress,
) -> _Scored:
    """Generates and scores the responses to part `number` of the prompts."""
    config, ranks = run.config, run.ranks
    evaluation = config.eval
    options = SamplingOptions(
        seed=derived_seed(evaluation.seed, "evaluation", number),
        step=0,
        weights_version=weights_version,
        temperature=evaluation.temperature or GREEDY_TEMPERATURE,
        max_new_tokens=evaluation.max_new_tokens or config.rollout.max_new_tokens,
        per_prompt=evaluation.per_prompt,
    )
    rollout = respond(
        run, run.policy, prompts, options, report,
        purpose=f"the evaluation after step {step}", on_ended=run.ask_early,
    )  # fmt: skip
    inputs = RewardInputs.of(rollout, step)
    raw = run.rewards(inputs, report)
    scores = scores_for_training(run, raw.total, rollout, options.max_new_tokens)
    parts = (raw.parts if len(raw.parts) > 1 else {}) | eval_rewards.parts(inputs, report)
    rows, limit = ranks.strided_share(rollout.rows), MicroBatchLimit.of(config, rollout)
    logprobs, reference = (
        ranks.all_reduce_sum(
            score_tokens(
                model, rollout, KL_TEMPERATURE, limit, rows=rows, want="logits", report=report
            )[0]
        )
        for model in (run.policy, run.reference)
    )
    kl = masked.sequence_kl(logprobs, reference, rollout.mask)
    return _Scored(rollout, scores, kl, parts, raw)


def _summarise(
    parts: list[_Scored], per_prompt: int, failed: Container[str] = ()
) -> dict[str, float]:
    scores = [s for p in parts for s in p.scores.tolist()]
    kl = [k for p in parts for k in p.kl.tolist()]
    lengths = [n for p in parts for n in p.rollout.lengths.tolist()]
    ended = [e for p in parts for e in p.rollout.ended.tolist()]
    metrics = {
        names.EVAL_SCORE: _mean(scores),
        names.EVAL_KL: _mean(kl),
        names.EVAL_LENGTH: _mean(lengths),
        names.EVAL_TRUNCATED: 1 - _mean(ended),
    }
    if (distinct := distinct_2([t for p in parts for t in p.rollout.sampled_texts])) is not None:
        metrics[names.EVAL_DISTINCT_2] = distinct
    if per_prompt > 1:
        metrics[names.EVAL_BEST_SCORE] = _mean(
            [max(group) for group in _groups(scores, per_prompt)]
        )
    interval = confidence_interval(scores, per_prompt)
    if interval is not None:
        metrics[names.EVAL_SCORE_CI] = interval
    for name in parts[0].parts:
        given = [s for p in parts for s in p.parts[name] if s is not None]
        if given and name not in failed:  # a mean over some of the responses would mislead
            metrics[names.EVAL_SOURCE.replace("NAME", name)] = _mean(given)
    return metrics


def confidence_interval(scores: list[float], per_prompt: int) -> float | None:
    """Half the width of the 95 % confidence interval of the mean score.

    Responses to one prompt are not independent, so the standard error is that of the prompts'
    means (Miller 2024, "Adding error bars to evals", arXiv 2411.00640).

    Args:
        scores: B scores, those of one prompt adjacent.
        per_prompt: responses to each prompt.

    Returns:
        1.96 standard errors, or None for a single prompt.
    """
    means = [_mean(group) for group in _groups(scores, per_prompt)]
    if len(means) < 2:
        return None
    centre = _mean(means)
    variance = sum((m - centre) ** 2 for m in means) / (len(means) - 1)
    return 1.96 * math.sqrt(variance / len(means))


def _groups(scores: list[float], per_prompt: int) -> list[list[float]]:
    """The scores by prompt."""
    return [scores[i : i + per_prompt] for i in range(0, len(scores), per_prompt)]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _samples(parts: list[_Scored]) -> list[Sample]:
    samples: list[Sample] = []
    for part in parts:
        rollout, kl = part.rollout, part.kl.tolist()
        for i, score in enumerate(part.scores.tolist()):
            samples.append(
                Sample(
                    index=len(samples),
                    prompt=rollout.batch.prompts[i].text,
                    response=rollout.texts[i],
                    score=score,
                    kl=kl[i],
                    length=int(rollout.lengths[i]),
                    ended=bool(rollout.ended[i]),
                    parts={name: scores[i] for name, scores in part.parts.items()},
                    turn_scores=part.raw.turns_of(i),
                    replies=rollout.replies(i),
                )
            )
    return samples


def recorded(samples: list[Sample]) -> list[Sample]:
    """The first samples, as many as a message can hold; the metrics have all.

    They have :data:`RECORDED_BYTES`, and the first :data:`RECORDED_TOKENS` have their arrays.
    """
    # A hundred for the numbers of each, and ten for those of a reply.
    sizes = itertools.accumulate(
        len(s.prompt.encode()) + len(s.response.encode()) + 100 + 10 * len(s.replies or ())
        for s in samples
    )
    tokens = itertools.accumulate(s.length if s.arrays is not None else 0 for s in samples)
    return [
        s if count <= RECORDED_TOKENS else msgspec.structs.replace(s, arrays=None)
        for s, size, count in zip(samples, sizes, tokens, strict=True)
        if size <= RECORDED_BYTES
    ]
