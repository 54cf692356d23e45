"""One PPO step, from prompts to metrics."""

import time

import msgspec
import torch
from torch import Tensor

from engine.errors import RlhfError
from engine.protocol.rank_messages import RankTimes, Sample
from engine.train.data.prompts import batch_prompts
from engine.train.data.randomness import sampling_uniforms
from engine.train.distributed.ranks import RankGroup
from engine.train.ppo import masked
from engine.train.ppo.advantages import AdvantageInputs, make_targets
from engine.train.ppo.forward import longest_first, score_tokens
from engine.train.ppo.metrics import peak_memory, step_metrics
from engine.train.ppo.optimise import learning_rate, optimise
from engine.train.reports.samples import kept_samples
from engine.train.rewards.normalise import Normaliser
from engine.train.rewards.source import RewardInputs
from engine.train.rollout.native import generate
from engine.train.rollout.rollout import ReportProgress, Rollout, merge_rollouts
from engine.train.run import Run

GAP_LIMIT = 1e-4
"""Cached and full forward passes of one model agree to this, nats a token, in float32 …"""

MIXED_GAP_LIMIT = 0.5
"""… and to this in bfloat16, where only gross mistakes can be told."""


def train_step(
    run: Run, step: int, recorded: Rollout | None = None
) -> tuple[dict[str, float], list[Sample]]:
    """Sample, score, compare with the reference, and update the policy: one step.

    Changes the policy, the optimiser and the running parts of `run.state`; nothing else. Every rank
    does its share of the forward and backward passes; what lies between is B × T at most and is
    computed by all of them alike, from the whole batch.

    Args:
        run: the run.
        step: its number, from 1; with the seed it decides every random choice in here.
        recorded: answers to learn from instead of generating, to compare runs by.

    Returns:
        The step's metrics, and the samples that are kept.
    """
    config, state, ranks = run.config, run.state, run.ranks
    began, clock = time.perf_counter(), run.clock
    clock.seconds.clear()

    # 1. Sample prompts, generate answers.
    with clock.phase(run, step, "generate") as report:
        rollout = recorded or take_rollout(run, step, report)

    # 2. Score them.
    with clock.phase(run, step, "score") as report:
        raw, parts = run.rewards(RewardInputs.of(rollout, step), report)
        normalise = Normaliser(state.reward_mean, state.reward_std)
        scores = normalise(raw.to(run.device), config.reward, rollout.ended)

    # 3. The reference's log-probabilities, and the old policy's where the rollout's cannot serve.
    own = ranks.strided_share(longest_first(rollout, rollout.rows))
    with clock.phase(run, step, "reference") as report:
        size = config.ppo.micro_batch_size
        ref_logprobs, _ = score_tokens(
            run.reference, rollout, config.rollout.temperature, size,
            rows=own, want="logits", report=report,
        )  # fmt: skip
        old_logprobs, old_values = old_policy(run, rollout, own)
    ref_logprobs = ranks.all_reduce_sum(ref_logprobs)

    if not run.checked and recorded is None:
        check_first_rollout(run, rollout, old_logprobs, ref_logprobs)

    # 4. Advantages, from the whole global batch.
    targets = make_targets(
        AdvantageInputs(
            scores, old_logprobs, ref_logprobs, old_values, rollout.mask, rollout.lengths,
            config.ppo, config.kl.beta, config.answers_per_prompt, state.baseline,
        )
    )  # fmt: skip
    if targets.baseline is not None:
        state.baseline = targets.baseline

    # 5. Several epochs of clipped updates.
    with clock.phase(run, step, "optimise") as report:
        done = optimise(
            ranks, run.learner, run.optimiser, rollout, targets, config,
            seed=state.sampling_seed, step=step, report=report,
        )  # fmt: skip

    # 6. What there is to tell.
    state.episodes += len(scores)
    metrics = step_metrics(rollout, scores, ref_logprobs, targets, done, config.kl.beta)
    metrics["episode"] = float(state.episodes)
    metrics["lr"] = learning_rate(config.train, step)
    metrics |= _mean_parts(parts)
    clock.ranks = gather_rank_times(run)
    metrics |= _speed(clock.ranks, rollout, time.perf_counter() - began)
    kept: list[Sample] = []
    if ranks.is_lead:  # it tells of them, so the others need none
        kept = kept_samples(
            config.log, run.tokenizer, rollout, scores, parts, targets, ref_logprobs
        )
    return metrics, kept


def take_rollout(run: Run, step: int, report: ReportProgress) -> Rollout:
    """The policy's answers to the step's prompts; each rank writes those to a stretch of them."""
    config, limit = run.config, run.config.rollout.max_new_tokens
    prompts = run.prompts.for_step(step)
    batch = batch_prompts(prompts, config.answers_per_prompt, run.tokenizer.eos_token_id or 0)
    uniforms = sampling_uniforms(run.state.sampling_seed, step, config.rollout.batch_size, limit)
    own = own_rows(run.ranks, len(prompts), config.answers_per_prompt)
    part = generate(
        run.policy, batch.select(own), uniforms[own], config.rollout.temperature, run.ending,
        run.tokenizer, report, per_prompt=config.answers_per_prompt,
    )  # fmt: skip
    return merge_rollouts(run.ranks, batch, part, own, limit, run.tokenizer)


def own_rows(ranks: RankGroup, prompts: int, per_prompt: int) -> Tensor:
    """This rank's rows of the batch, (n,) int64: all answers to a stretch of the prompts."""
    share = ranks.contiguous_share(prompts)
    return torch.arange(share.start * per_prompt, share.stop * per_prompt)


def old_policy(run: Run, rollout: Rollout, own: Tensor) -> tuple[Tensor, Tensor]:
    """Log π_old and V_old (B, T).

    In float32 the rollout's own serve, they agree with a full forward pass to rounding. In
    bfloat16 they do not, and are always computed again by the forward pass that training uses. A
    separate value trunk has not seen the tokens yet. What is computed is shared out: `own` rows.
    """
    size, temperature = run.config.ppo.micro_batch_size, run.config.rollout.temperature
    if run.config.model.dtype != "float32":
        logprobs, values = score_tokens(run.policy, rollout, temperature, size, rows=own)
        return run.ranks.all_reduce_sum(logprobs), run.ranks.all_reduce_sum(values)
    if run.policy.value_trunk is not None:
        _, values = score_tokens(run.policy, rollout, temperature, size, rows=own, want="values")
        return rollout.logprobs * rollout.mask, run.ranks.all_reduce_sum(values)
    return rollout.logprobs * rollout.mask, rollout.values * rollout.mask


def gather_rank_times(run: Run) -> list[RankTimes]:
    """What this step took each rank so far; by rank, on all of them."""
    mine = RankTimes(
        rank=run.ranks.rank, seconds=run.clock.seconds, peak_memory=peak_memory(run.device)
    )
    told = run.ranks.all_gather_bytes(msgspec.msgpack.encode(mine))
    return [msgspec.msgpack.decode(t, type=RankTimes) for t in told]


def check_first_rollout(
    run: Run, rollout: Rollout, old_logprobs: Tensor, ref_logprobs: Tensor
) -> None:
    """Holds an attempt's first rollout against what must be true of any.

    A model whose cache, positions or masks are used wrongly still trains, on the wrong ratios: a
    few answers' log-probabilities while generating must be those of a full forward pass. Before the
    first update the policy is its reference, so the KL must be 0.

    Raises:
        RlhfError: they disagree by more than rounding.
    """
    few, name = rollout.rows[:4], type(run.policy.lm).__name__
    exact = run.config.model.dtype == "float32"
    full, _ = score_tokens(
        run.policy, rollout.select(few), run.config.rollout.temperature, len(few), want="logits"
    )
    gap = float((full - rollout.logprobs[few] * rollout.mask[few]).abs().max())
    if gap > (GAP_LIMIT if exact else MIXED_GAP_LIMIT):
        raise RlhfError(
            f"{name}: log-probabilities while generating and in a full forward pass differ by "
            f"{gap:.2g} nats on a token, more than rounding explains: this architecture cannot be "
            "trained safely here"
        )
    kl = float(masked.sequence_kl(old_logprobs, ref_logprobs, rollout.mask).abs().mean())
    own_start = run.config.model.reference is None and run.state.step == 0
    if exact and own_start and kl > GAP_LIMIT * rollout.ids.shape[1]:
        raise RlhfError(
            f"{name}: the KL to the reference is {kl:.2g} nats before the first update, not 0"
        )
    run.checked = True


def _mean_parts(parts: dict[str, list[float | None]]) -> dict[str, float]:
    """Each source's own mean score, where there are several."""
    if len(parts) < 2:
        return {}
    heard = {k: [s for s in v if s is not None] for k, v in parts.items()}
    return {f"reward/{k}": sum(v) / len(v) for k, v in heard.items() if v}


def _speed(ranks: list[RankTimes], rollout: Rollout, seconds: float) -> dict[str, float]:
    """Of each phase the slowest rank's time: the others wait for it."""
    times = {f"time/{k}": max(r.seconds[k] for r in ranks) for k in ranks[0].seconds}
    return times | {
        "time/step": seconds,
        "perf/tokens_per_second": float(rollout.lengths.sum()) / seconds,
        "perf/episodes_per_second": len(rollout.ids) / seconds,
        "perf/peak_memory_gb": max(r.peak_memory for r in ranks) / 1e9,
    }
