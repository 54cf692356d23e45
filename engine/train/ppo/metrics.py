"""Computes the metrics of a step.

Metrics that TRL's PPO trainer also reports have the same names as there. All are declared in
:mod:`engine.metrics`.
"""

import itertools
import math

from torch import Tensor

from engine.config.schema import RunConfig
from engine.metrics import DISTINCT_2, REPLIES_LEFT_OUT
from engine.protocol.rank_messages import RankTimes
from engine.train.ppo import masked
from engine.train.ppo.advantages import Targets, constant_groups
from engine.train.ppo.kl_estimators import KL_ESTIMATORS
from engine.train.ppo.rollout_correction import gap_metrics
from engine.train.ppo.update_stats import UpdateStats
from engine.train.rollout.conversation import Conversation
from engine.train.rollout.rollout import Rollout


def step_metrics(
    rollout: Rollout,
    scores: Tensor,
    ref_logprobs: Tensor,
    targets: Targets,
    stats: UpdateStats,
    config: RunConfig,
) -> dict[str, float]:
    """Computes all metrics except times and counters; omits undefined metrics.

    Args:
        rollout: B responses of at most T tokens.
        scores: (B,), normalised and clipped.
        ref_logprobs: (B, T).
        targets: what the epochs trained on.
        stats: what the epochs did.
        config: in force for this step.
    """
    beta = config.kl.beta
    mask = rollout.mask
    old = targets.old_logprobs
    kl = masked.sequence_kl(old, ref_logprobs, mask)
    lengths = rollout.lengths.float()
    tensors = {
        "objective/kl": kl.mean(),
        "objective/kl_per_token": kl.sum() / mask.sum(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/non_score_reward": -beta * kl.mean(),
        "objective/rlhf_reward": (scores - beta * kl).mean(),
        "objective/entropy": -(old * mask).sum(1).mean(),
        "policy/entropy_avg": masked.masked_mean(rollout.entropies, mask),
        "val/num_eos_tokens": rollout.eos.sum(),
        "tokens/response_len_mean": lengths.mean(),
        "tokens/truncated_frac": (~rollout.ended).sum(),
    }
    learned = {
        "advantages": targets.advantages,
        "returns": targets.returns,
        "values": targets.old_values,
    }
    for name, x in learned.items():
        if x is not None:
            found = masked.statistics(x, mask)
            tensors |= {f"{name}/{statistic}": value for statistic, value in found.items()}
    numbers = masked.as_float64(tensors.values()).tolist()
    metrics = dict(zip(tensors, numbers, strict=True))
    metrics["tokens/truncated_frac"] /= len(scores)
    metrics["objective/kl_coef"] = beta
    if (distinct := distinct_2(rollout.sampled_texts)) is not None:
        metrics[DISTINCT_2] = distinct
    if config.kl.estimator != "k1":
        estimates = KL_ESTIMATORS[config.kl.estimator]((old - ref_logprobs) * mask) * mask
        metrics["objective/kl_penalty"] = float(estimates.sum(1).mean())
    return (
        metrics
        | _optimiser_metrics(stats, config)
        | _value_metrics(mask, targets, stats, fitted=config.linear_value)
        | gap_metrics(targets, rollout, config.ppo)
    )


def group_metrics(scores: Tensor, training_scores: Tensor, per_prompt: int) -> dict[str, float]:
    """Measures how scores (B,) vary within prompts; empty with one response per prompt.

    Whether a prompt has an effect on training is decided by the scores of its advantages, which
    differ with `normalise: group` of reward sources.
    """
    if per_prompt < 2:
        return {}
    deviations = scores.view(-1, per_prompt).std(1, correction=0)
    return {
        "objective/group_std": float(deviations.mean()),
        "objective/zero_std_frac": float(
            constant_groups(training_scores, per_prompt).float().mean()
        ),
    }


def _optimiser_metrics(stats: UpdateStats, config: RunConfig) -> dict[str, float]:
    metrics = {
        "policy/skipped_updates": float(stats.skipped),
        "policy/nonfinite_updates": float(stats.nonfinite),
    }
    if config.ppo.entropy_target is not None:
        metrics["policy/entropy_coef"] = config.ppo.entropy_coef
    sums = stats.sums
    if not stats.updates:
        return metrics
    ratio = sums.ratio / sums.tokens
    if config.ppo.dual_clip is not None:
        metrics["policy/dual_clipfrac"] = sums.dual_clipped / sums.tokens
    if config.ppo.off_policy_mask is not None:
        metrics["policy/off_policy_frac"] = sums.off_policy / sums.tokens
    if config.ppo.entropy_coef:
        metrics["loss/entropy_avg"] = sums.entropy / sums.tokens
    if config.ppo.router_coef:
        metrics["loss/router_avg"] = sums.router_loss / sums.tokens
    if config.kl.place == "loss":
        metrics["loss/kl_avg"] = sums.kl / sums.tokens
    return metrics | {
        "policy/approxkl_avg": sums.approx_kl,
        "policy/clipfrac_avg": sums.clipped / sums.tokens,
        "policy/clipfrac_high": sums.clipped_high / sums.tokens,
        "policy/clipfrac_low": sums.clipped_low / sums.tokens,
        "loss/policy_avg": sums.policy_loss / sums.tokens,
        "val/ratio": ratio,
        "val/ratio_var": max(0.0, sums.squared_ratio / sums.tokens - ratio**2),
        "grad_norm": sum(stats.grad_norms) / stats.updates,
    }


def _value_metrics(
    mask: Tensor, targets: Targets, stats: UpdateStats, *, fitted: bool
) -> dict[str, float]:
    """`fitted`: whether the value function is fitted between steps and has no loss in updates."""
    sums = stats.sums
    if not stats.updates or targets.returns is None or targets.old_values is None:
        return {}
    if fitted:
        errors = masked.masked_mean((targets.old_values - targets.returns) ** 2, mask)
        metrics = {"loss/value_avg": 0.5 * float(errors)}
    else:
        metrics = {
            "loss/value_avg": sums.value_loss / sums.tokens,
            "val/clipfrac_avg": sums.value_clipped / sums.tokens,
        }
    explained = float(masked.explained_variance(targets.old_values, targets.returns, mask))
    return metrics | ({} if math.isnan(explained) else {"val/explained_var": explained})


def source_metrics(parts: dict[str, list[float | None]]) -> dict[str, float]:
    """Mean score of each reward source, if there are several; ignores None scores."""
    if len(parts) < 2:
        return {}
    scored = {k: [s for s in v if s is not None] for k, v in parts.items()}
    return {f"reward/{k}": sum(v) / len(v) for k, v in scored.items() if v}


def conversation_metrics(conversation: Conversation, rollout: Rollout) -> dict[str, float]:
    """Counts the turns and the replies of an environment, and the time that these took."""
    replied, count = conversation.lengths - rollout.lengths, len(conversation.turns)
    metrics = {
        "environment/turns": sum(t.count for t in conversation.turns) / count,
        "environment/reply_tokens": float(replied.double().mean()),
        REPLIES_LEFT_OUT: sum(t.reply_left_out for t in conversation.turns) / count,
        "time/environment": conversation.environment_seconds,
    }
    if conversation.has_tools:
        calls = sum(t.tool_calls for t in conversation.turns)
        metrics["environment/tool_calls"] = calls / count
        if calls:
            failed = sum(t.failed_calls for t in conversation.turns)
            metrics["environment/failed_calls"] = failed / calls
    return metrics


def speed_metrics(ranks: list[RankTimes], rollout: Rollout, seconds: float) -> dict[str, float]:
    """Computes times and rates. A phase's time is the slowest rank's: the others wait for it.

    Args:
        ranks: every rank's phase times.
        rollout: the whole batch.
        seconds: duration of the step.
    """
    times = {f"time/{k}": max(r.seconds[k] for r in ranks) for k in ranks[0].seconds}
    return times | {
        "time/step": seconds,
        "perf/tokens_per_second": int(rollout.host_lengths[1].sum()) / seconds,
        "perf/episodes_per_second": len(rollout.ids) / seconds,
        "perf/peak_memory_gb": max(r.peak_memory for r in ranks) / 1e9,
    }


def distinct_2(texts: list[str]) -> float | None:
    """Distinct word bigrams divided by all word bigrams of the batch; None if there are none.

    This is distinct-2 (Li et al. 2016). It falls when responses repeat themselves or each other.
    """
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else None
