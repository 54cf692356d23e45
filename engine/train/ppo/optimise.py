"""The PPO epochs over one step's rollout."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from engine.config.schema import RunConfig
from engine.progress import ReportProgress, report_nothing
from engine.train.data.randomness import permutation
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import full_tensor, synchronised
from engine.train.ppo import losses
from engine.train.ppo.adamw import learning_rate
from engine.train.ppo.advantages import Targets
from engine.train.ppo.forward import (
    MicroBatchLimit,
    longest_first,
    micro_batches,
    rollout_forward,
)
from engine.train.ppo.kl_estimators import KL_ESTIMATORS, absolute
from engine.train.ppo.masked import as_float64
from engine.train.ppo.update_stats import LossSums, UpdateStats
from engine.train.rollout.rollout import Rollout

MAX_MEAN_RATIO = 10.0
"""A minibatch with a larger mean ratio is skipped and counted (`ratio_threshold` in TRL 0.11)."""

POLICY_SUMS = (
    "tokens", "policy_loss", "clipped_high", "clipped_low", "dual_clipped", "off_policy",
    "squared_log_ratio", "ratio", "squared_ratio", "entropy", "kl",
)  # fmt: skip
"""The fields of :class:`LossSums` that are computed with the policy loss."""


def optimise(
    ranks: RankGroup,
    learner: nn.Module,
    optimiser: torch.optim.Optimizer,
    rollout: Rollout,
    targets: Targets,
    config: RunConfig,
    *,
    seed: int,
    step: int,
    report: ReportProgress = report_nothing,
) -> UpdateStats:
    """Runs `ppo.epochs` passes of minibatch updates over a rollout.

    Changes the policy and the optimiser in place, and sets the learning rate of this step. Every
    decision (skip, stop early) is made from sums over all ranks, so it is the same on each.

    Args:
        ranks: all ranks of this attempt.
        learner: the policy as wrapped for training (:func:`sharding.learner`).
        optimiser: from :func:`engine.train.ppo.adamw.make_optimiser`.
        rollout: B responses of at most T tokens, the same on every rank.
        targets: (B, T) each.
        config: in force for this step.
        seed: with `step`, determines the order of the minibatches.
        step: from 1.
        report: called with (responses done, responses), counted over all epochs and ranks.
    """
    stats, done = UpdateStats(), 0
    total = config.ppo.epochs * len(rollout.ids)

    def report_part(passes: int, of: int) -> None:
        report(done + len(rows) * passes // of, total)

    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config.train, step) * group["lr_scale"]
    warming_up = step <= config.ppo.value_warmup and targets.returns is not None
    # transformers recomputes activations only in training mode. Dropout is 0 in both modes.
    learner.train(config.parallel.activation_checkpointing)
    for epoch in range(config.ppo.epochs):
        order = permutation(seed, "minibatches", (step, epoch), len(rollout.ids))
        for rows in order.chunk(config.ppo.minibatches):
            sums = backward(
                ranks, learner, rollout, targets, rows, config, warming_up, report=report_part
            )
            if config.ppo.stop_kl is not None and sums.approx_kl > config.ppo.stop_kl:
                optimiser.zero_grad(set_to_none=True)
                learner.eval()
                return stats
            norm = clip_gradient(learner, config.ppo.max_grad_norm, config.ppo.value_max_grad_norm)
            loss = sums.policy_loss + sums.value_loss
            finite = math.isfinite(loss) and math.isfinite(norm)
            if not finite or sums.ratio / sums.tokens > MAX_MEAN_RATIO:
                stats.skipped += 1
                stats.nonfinite += not finite
            else:
                optimiser.step()
                stats.updates += 1
                stats.grad_norms.append(norm)
                stats.sums.add(sums)
            optimiser.zero_grad(set_to_none=True)
            done += len(rows)
    learner.eval()
    return stats


def clip_gradient(learner: nn.Module, limit: float, value_limit: float | None = None) -> float:
    """Clips the global gradient norm to `limit`; returns the norm before clipping.

    With `value_limit`, the value function's gradient is clipped to that, apart from the others.
    """
    if value_limit is None:
        return _clip(learner.parameters(), limit)
    of_value: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in learner.named_parameters():
        (of_value if _is_of_value(name) else others).append(parameter)
    return math.hypot(_clip(others, limit), _clip(of_value, value_limit))


def _clip(parameters: Iterable[nn.Parameter], limit: float) -> float:
    # foreach: a few kernels for all parameters, including sharded ones.
    return float(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)))


def backward(
    ranks: RankGroup,
    learner: nn.Module,
    rollout: Rollout,
    targets: Targets,
    rows: Tensor,
    config: RunConfig,
    warming_up: bool = False,
    *,
    report: ReportProgress = report_nothing,
) -> LossSums:
    """Accumulates the gradient of one minibatch; returns its sums over all ranks.

    The loss is divided by the minibatch's token count over all ranks, which is known in advance, so
    it depends neither on the micro-batch size nor on the number of ranks.

    Args:
        ranks: all ranks of this attempt.
        learner: the policy as wrapped for training.
        rollout: B responses of at most T tokens.
        targets: (B, T) each.
        rows: the minibatch's rows, the same on every rank; (n,) int64, on the host.
        config: in force for this step.
        warming_up: train the value function only (`ppo.value_warmup`).
        report: called with this rank's (passes done, passes).
    """
    minibatch = losses.MinibatchSize(
        tokens=int(rollout.host_lengths[1, rows].sum()),
        responses=len(rows),
        max_new_tokens=config.rollout.max_new_tokens,
    )
    limit = MicroBatchLimit.of(config, rollout)
    shares = ranks.strided_shares(longest_first(rollout, rows))
    micros_by_rank = [micro_batches(rollout, share, limit) for share in shares]
    micros = micros_by_rank[ranks.rank]
    # DDP and FSDP2 communicate in every pass, so all ranks must run the same number of passes: a
    # rank with fewer micro-batches runs the remaining ones on one row, with a loss of 0.
    count = max(map(len, micros_by_rank))
    wants = ("logits", "values") if separate_passes(ranks, learner) else ("both",)
    total: Tensor | None = None
    passes = list(itertools.product(range(count), wants))
    for done, (k, want) in enumerate(passes, start=1):
        dummy = k >= len(micros)
        with synchronised(learner, last=k == count - 1):
            micro = rows[:1] if dummy else micros[k]
            loss, sums = micro_batch(
                learner, rollout, targets, micro, minibatch, config, warming_up, want
            )
            # DDP and FSDP2 average gradients over ranks; this loss needs their sum.
            (loss * (0.0 if dummy else ranks.size / minibatch.tokens)).backward()
        if not dummy:
            total = sums if total is None else total + sums
        report(done, len(passes))
    if warming_up:
        _drop_policy_gradients(learner)
    if total is None:  # this rank had only dummy passes
        total = torch.zeros(len(fields(LossSums)), dtype=torch.float64)
    return LossSums(*ranks.all_reduce_sum(total).tolist())  # the minibatch's first wait for a GPU


def separate_passes(ranks: RankGroup, learner: nn.Module) -> bool:
    """Whether policy and value run separate forward and backward passes over a micro-batch.

    A separate value trunk shares no activations with the policy, so running one after the other
    halves peak memory. This requires a single rank, since DDP expects a gradient for all parameters
    in each backward pass.
    """
    return ranks.size == 1 and getattr(learner, "value_trunk", None) is not None


def micro_batch(
    learner: nn.Module,
    rollout: Rollout,
    targets: Targets,
    micro: Tensor,
    minibatch: losses.MinibatchSize,
    config: RunConfig,
    warming_up: bool,
    want: str = "both",
) -> tuple[Tensor, Tensor]:
    """Runs one forward pass over n rows and computes their loss.

    Args:
        learner: the policy as wrapped for training.
        rollout: B responses of at most T tokens.
        targets: (B, T) each.
        micro: the micro-batch's rows; (n,) int64, on the host.
        minibatch: size of the whole minibatch, over all ranks.
        config: in force for this step.
        warming_up: the policy loss gets a factor of 0.
        want: `both`, or `logits` or `values` for the policy or the value loss alone.

    Returns:
        The loss, a scalar with gradient, summed over response tokens; and the fields of
        :class:`LossSums`, (n,) float64 on the device, so that the host need not wait for them.
    """
    there = micro.to(rollout.ids.device)
    terms = PolicyInputs.of(rollout, targets, micro, there, minibatch, config)
    outputs = rollout_forward(
        learner, rollout, micro, config.rollout.temperature, want=want, detach_trunk=warming_up,
        entropies=config.ppo.entropy_coef > 0,
        loss=partial(_policy_loss_of_tokens, terms, config),
        separable=config.ppo.ratio == "token" and config.ppo.off_policy_mask is None,
        balance=config.ppo.router_coef > 0,
    )  # fmt: skip
    values, width = outputs.values, outputs.width
    mask = rollout.mask[there, :width]
    loss = torch.zeros((), device=mask.device)
    sums = dict.fromkeys((f.name for f in fields(LossSums)), loss)
    if want != "values":
        if outputs.loss is None:
            loss, found = _policy_loss(outputs.logprobs, outputs.entropies, terms, config)
        else:
            loss, of_policy = outputs.loss
            found = dict(zip(POLICY_SUMS, of_policy, strict=True))
        sums |= found
        if outputs.router_loss is not None:  # a mean over tokens, weighted like the other terms
            of_routers = outputs.router_loss * mask.sum()
            loss = loss + config.ppo.router_coef * of_routers
            sums["router_loss"] = of_routers.detach()
        # During the value warm-up the policy's gradient is 0. DDP still expects one.
        loss = loss * 0.0 if warming_up else loss
    if values is None or targets.old_values is None or targets.returns is None:
        return loss, as_float64(sums.values())
    value_loss, clipped = losses.value_terms(
        values,
        targets.old_values[there, :width],
        targets.returns[there, :width],
        mask,
        config.ppo.value_clip,
    )
    sums |= {"value_loss": value_loss.detach(), "value_clipped": clipped}
    return loss + config.ppo.value_coef * value_loss, as_float64(sums.values())


@dataclass(frozen=True)
class PolicyInputs:
    """Inputs of the policy loss of some tokens, except their log-probabilities; (n, t') each."""

    mask: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    """None unless `kl.place: loss`."""
    rollout_logprobs: Tensor | None
    """None without `ppo.off_policy_mask`."""
    held_back: Tensor | None
    """None without `ppo.kl_cov`."""
    weights: Tensor | None
    """Weight of each row in the loss, (n,); None means 1."""

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        targets: Targets,
        micro: Tensor,
        there: Tensor,
        minibatch: losses.MinibatchSize,
        config: RunConfig,
    ) -> "PolicyInputs":
        """Selects the inputs of a micro-batch's rows, trimmed to their longest response.

        `micro` and `there` are the row indices on the host and on the device.
        """
        width = int(rollout.host_lengths[1, micro].max())
        ref_logprobs = targets.ref_logprobs if config.kl.place == "loss" else None
        advantages = targets.advantages[there, :width]
        if targets.token_weights is not None:
            # A token's loss scales linearly with its advantage, so weighting either is equivalent.
            advantages = advantages * targets.token_weights[there, :width]
        return cls(
            mask=rollout.mask[there, :width],
            old_logprobs=targets.old_logprobs[there, :width],
            advantages=advantages,
            ref_logprobs=None if ref_logprobs is None else ref_logprobs[there, :width],
            rollout_logprobs=None
            if config.ppo.off_policy_mask is None
            else rollout.logprobs[there, :width],
            held_back=None if targets.held_back is None else targets.held_back[there, :width],
            weights=losses.AGGREGATIONS[config.ppo.loss_aggregation](
                minibatch, rollout.lengths[there]
            ),
        )

    def part(self, tokens: Tensor) -> "PolicyInputs":
        """Selects tokens by their indices in n·t', (c,), each as a row of its own: (c, 1)."""

        def column(x: Tensor) -> Tensor:
            return x.reshape(-1, 1).index_select(0, tokens)

        ref, sampled, weights = self.ref_logprobs, self.rollout_logprobs, self.weights
        held_back = self.held_back
        return PolicyInputs(
            mask=column(self.mask),
            old_logprobs=column(self.old_logprobs),
            advantages=column(self.advantages),
            ref_logprobs=None if ref is None else column(ref),
            rollout_logprobs=None if sampled is None else column(sampled),
            held_back=None if held_back is None else column(held_back),
            weights=None
            if weights is None
            else column(weights[:, None].expand_as(self.mask)).squeeze(1),
        )


def _policy_loss_of_tokens(
    inputs: PolicyInputs,
    config: RunConfig,
    tokens: Tensor | None,
    logprobs: Tensor,
    entropies: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`_policy_loss` as a :data:`LossOfRows`; its sums in the order of `POLICY_SUMS`."""
    inputs = inputs if tokens is None else inputs.part(tokens)
    shape = inputs.mask.shape
    loss, sums = _policy_loss(
        logprobs.view(shape), None if entropies is None else entropies.view(shape), inputs, config
    )
    zero = torch.zeros((), device=loss.device)
    return loss, as_float64(sums.get(name, zero) for name in POLICY_SUMS)


def _policy_loss(
    logprobs: Tensor, entropies: Tensor | None, inputs: PolicyInputs, config: RunConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the policy loss minus the entropy bonus, plus the penalties of tokens.

    Those are the KL to the reference with `kl.place: loss`, and that of `ppo.kl_cov`, which counts
    as policy loss.

    Args:
        logprobs: (n, t'), with gradient.
        entropies: (n, t'), with gradient; None without an entropy bonus.
        inputs: the other inputs of the same tokens.
        config: in force for this step.

    Returns:
        The sum over the mask, and sums for :class:`LossSums` by name.
    """
    ppo, mask, weights = config.ppo, inputs.mask, inputs.weights
    advantages, sums = inputs.advantages, dict[str, Tensor]()
    if inputs.rollout_logprobs is not None and ppo.off_policy_mask is not None:
        left_out = losses.off_policy(
            logprobs, inputs.rollout_logprobs, advantages, mask, ppo.off_policy_mask
        )
        advantages = advantages.masked_fill(left_out, 0.0)
        sums["off_policy"] = left_out.sum()
    terms = losses.policy_terms(logprobs, inputs.old_logprobs, advantages, mask, ppo, weights)
    sums |= {
        "tokens": mask.sum(),
        "policy_loss": terms.loss.detach(),
        "clipped_high": terms.clipped_high,
        "clipped_low": terms.clipped_low,
        "dual_clipped": terms.dual_clipped,
        "squared_log_ratio": terms.squared_log_ratio,
        "ratio": terms.ratio,
        "squared_ratio": terms.squared_ratio,
    }
    loss = terms.loss
    if inputs.held_back is not None:
        changes = absolute(losses.log_ratio(logprobs, inputs.old_logprobs, mask, "token"))
        penalty = losses.weighted_sum(changes * inputs.held_back, mask, weights)
        loss = loss + ppo.kl_cov_coef * penalty
        sums["policy_loss"] = loss.detach()
    if entropies is not None:
        entropy = losses.weighted_sum(entropies, mask, weights)
        sums["entropy"] = entropy.detach()
        loss = loss - ppo.entropy_coef * entropy
    if inputs.ref_logprobs is not None:
        estimates = KL_ESTIMATORS[config.kl.estimator]((logprobs - inputs.ref_logprobs) * mask)
        if config.kl.importance_weighted:
            log_rho = losses.log_ratio(logprobs, inputs.old_logprobs, mask, ppo.ratio)
            estimates = estimates * log_rho.exp()
        kl = losses.weighted_sum(estimates, mask, weights)
        sums["kl"] = kl.detach()
        loss = loss + config.kl.beta * kl
    return loss, sums


def _drop_policy_gradients(learner: nn.Module) -> None:
    # With a gradient of 0 instead of None, momentum and weight decay would move the policy.
    for name, parameter in learner.named_parameters():
        if not _is_of_value(name):
            parameter.grad = None


def _is_of_value(name: str) -> bool:
    """Whether a learner's parameter is one of the value function, by its name."""
    return "value_head." in name or "value_trunk." in name
