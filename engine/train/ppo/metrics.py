"""A step's metrics, by TRL's names where TRL has one. They are declared in engine/metrics.py."""

import itertools
import math
import resource

import torch
from torch import Tensor

from engine.config.settings import Settings
from engine.train.ppo import masked
from engine.train.ppo.optimise import Targets, UpdateStats
from engine.train.rollout.rollout import Rollout


def step_metrics(
    rollout: Rollout,
    scores: Tensor,
    ref_logprobs: Tensor,
    targets: Targets,
    done: UpdateStats,
    settings: Settings,
) -> dict[str, float]:
    """Everything but times and counters. Means are masked; what is undefined is left out."""
    mask = rollout.mask
    old = targets.old_logprobs
    kl = masked.sequence_kl(old, ref_logprobs, mask)
    beta = settings.beta
    lengths = rollout.lengths.float()
    count = len(scores)
    metrics = {
        "objective/kl": float(kl.mean()),
        "objective/kl_per_token": float(kl.sum() / mask.sum()),
        "objective/kl_coef": beta,
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std(correction=0)),
        "objective/non_score_reward": float(-beta * kl.mean()),
        "objective/rlhf_reward": float((scores - beta * kl).mean()),
        "objective/entropy": float(-(old * mask).sum(1).mean()),
        "policy/entropy_avg": float(masked.masked_mean(rollout.entropies, mask)),
        "val/num_eos_tokens": float(rollout.eos.sum()),
        "tokens/response_len_mean": float(lengths.mean()),
        "tokens/truncated_frac": float((~rollout.ended).sum()) / count,
        "text/distinct_2": distinct_2(rollout.texts),
        "val/rollout_logprob_gap": float(((old - rollout.logprobs).abs() * mask).max()),
    }
    return metrics | _optimiser_metrics(done) | _value_metrics(mask, targets, done)


def _optimiser_metrics(done: UpdateStats) -> dict[str, float]:
    metrics = {
        "policy/skipped_updates": float(done.skipped),
        "policy/nonfinite_updates": float(done.nonfinite),
    }
    sums = done.sums
    if not done.updates:
        return metrics
    ratio = sums.ratio / sums.tokens
    return metrics | {
        "policy/approxkl_avg": sums.approx_kl,
        "policy/clipfrac_avg": sums.clipped / sums.tokens,
        "loss/policy_avg": sums.policy_loss / sums.tokens,
        "val/ratio": ratio,
        "val/ratio_var": max(0.0, sums.squared_ratio / sums.tokens - ratio**2),
        "grad_norm": sum(done.grad_norms) / done.updates,
    }


def _value_metrics(mask: Tensor, targets: Targets, done: UpdateStats) -> dict[str, float]:
    sums = done.sums
    if not done.updates or targets.returns is None or targets.old_values is None:
        return {}
    metrics = {
        "loss/value_avg": sums.value_loss / sums.tokens,
        "val/clipfrac_avg": sums.value_clipped / sums.tokens,
    }
    explained = float(masked.explained_variance(targets.old_values, targets.returns, mask))
    return metrics | ({} if math.isnan(explained) else {"val/explained_var": explained})


def distinct_2(texts: list[str]) -> float:
    """Different pairs of neighbouring words over all such pairs, in the whole batch; 1 if none.

    Falls when answers repeat themselves and when they repeat each other.
    """
    pairs = [pair for text in texts for pair in _neighbours(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _neighbours(words: list[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(words))


def peak_memory(device: torch.device) -> int:
    """The most bytes this rank ever held: of the GPU's memory, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
