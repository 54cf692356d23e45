"""The PPO epochs over one step's rollout."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.config.schema import RunConfig
from engine.train.data.randomness import permutation
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import full_tensor, synchronised
from engine.train.ppo import losses
from engine.train.ppo.adamw import learning_rate
from engine.train.ppo.advantages import Targets
from engine.train.ppo.forward import by_length, longest_first, rollout_forward
from engine.train.ppo.update_stats import LossSums, UpdateStats
from engine.train.rollout.rollout import Rollout

MAX_MEAN_RATIO = 10.0
"""A minibatch whose mean ratio exceeds this would wreck the policy: it is skipped and counted."""


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
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> UpdateStats:
    """Several passes of minibatch updates; learning rate and policy are changed in place.

    `learner` is the policy as the epochs enter it (`sharding.learner`). What is decided in here is
    decided from sums over all ranks, and so the same on each.
    """
    done = UpdateStats()
    total = config.ppo.epochs * config.ppo.minibatches
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config.train, step) * group["times"]
    warming_up = step <= config.ppo.value_warmup and targets.returns is not None
    # transformers computes activations again in training mode alone; dropout is 0 in any mode.
    learner.train(config.parallel.activation_checkpointing)
    for epoch in range(config.ppo.epochs):
        order = permutation(seed, "minibatches", (step, epoch), len(rollout.ids))
        for k, rows in enumerate(order.to(rollout.ids.device).chunk(config.ppo.minibatches)):
            sums = backward(ranks, learner, rollout, targets, rows, config, warming_up)
            if done.first is None:
                done.first = sums
            if config.ppo.stop_kl is not None and sums.approx_kl > config.ppo.stop_kl:
                done.stopped_early = True
                optimiser.zero_grad(set_to_none=True)
                learner.eval()
                return done
            norm = clip_gradient(learner, config.ppo.max_grad_norm)
            loss = sums.policy_loss + sums.value_loss
            finite = math.isfinite(loss) and math.isfinite(norm)
            if not finite or sums.ratio / sums.tokens > MAX_MEAN_RATIO:
                done.skipped += 1
                done.nonfinite += not finite
            else:
                optimiser.step()
                done.updates += 1
                done.grad_norms.append(norm)
                done.sums.add(sums)
            optimiser.zero_grad(set_to_none=True)
            report(epoch * config.ppo.minibatches + k + 1, total)
    learner.eval()
    return done


def clip_gradient(learner: nn.Module, limit: float) -> float:
    """Holds the norm of the whole gradient to a limit; what it was before."""
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), limit)
    return float(full_tensor(norm))


def backward(
    ranks: RankGroup,
    learner: nn.Module,
    rollout: Rollout,
    targets: Targets,
    rows: Tensor,
    config: RunConfig,
    warming_up: bool = False,
) -> LossSums:
    """Accumulates the gradient of one minibatch and returns its sums over all ranks.

    The denominator is the minibatch's token count over all ranks, known beforehand, so the loss
    depends neither on the micro-batches nor on how rows are shared out.
    """
    tokens = int(rollout.lengths[rows].sum())
    size = config.ppo.micro_batch_size
    micros = by_length(rollout, ranks.strided_share(longest_first(rollout, rows)), size)
    # Forward and backward passes of several ranks meet: one with fewer rows goes through the
    # motions once more, for nothing.
    count = -(-ranks.largest_share(len(rows)) // size)
    wants = ("logits", "values") if one_after_the_other(ranks, learner) else ("both",)
    total = LossSums()
    for k, want in itertools.product(range(count), wants):
        idle = k >= len(micros)
        with synchronised(learner, last=k == count - 1):
            micro = rows[:1] if idle else micros[k]
            loss, sums = micro_batch(learner, rollout, targets, micro, config, warming_up, want)
            # DDP and FSDP2 average over ranks what is to be a sum.
            (loss * (0.0 if idle else ranks.size / tokens)).backward()
        if not idle:
            total.add(sums)
    if warming_up:
        _keep_policy(learner)
    return total.over(ranks)


def one_after_the_other(ranks: RankGroup, learner: nn.Module) -> bool:
    """Whether policy and value go through a micro-batch each by itself.

    A value trunk of its own shares nothing with the policy: on a rank alone (DDP wants to see both
    at once) one is through, and its activations are gone, before the other begins.
    """
    return ranks.size == 1 and getattr(learner, "value_trunk", None) is not None


def micro_batch(
    learner: nn.Module,
    rollout: Rollout,
    targets: Targets,
    micro: Tensor,
    config: RunConfig,
    warming_up: bool,
    want: str = "both",
) -> tuple[Tensor, LossSums]:
    """One forward pass: the loss, summed over response tokens, and its sums.

    `want` is `both`, or `logits` or `values` for one of the two losses alone.
    """
    logprobs, values, width = rollout_forward(
        learner, rollout, micro, config.rollout.temperature, want=want, detach_trunk=warming_up
    )
    mask = rollout.mask[micro, :width]
    loss, sums = torch.zeros((), device=mask.device), LossSums()
    if want != "values":
        old, advantages = (x[micro, :width] for x in (targets.old_logprobs, targets.advantages))
        terms = losses.policy_terms(
            logprobs, old, advantages, mask, config.ppo.clip_range, config.ppo.ratio
        )
        sums = LossSums(
            tokens=float(mask.sum()),
            policy_loss=float(terms.loss.detach()),
            clipped=float(terms.clipped),
            squared_log_ratio=float(terms.squared_log_ratio),
            ratio=float(terms.ratio),
            squared_ratio=float(terms.squared_ratio),
        )
        # While the value warms up the policy's gradient is 0 and is dropped; DDP wants to see one.
        loss = terms.loss * (not warming_up) if targets.returns is not None else terms.loss
    if values is None or targets.old_values is None or targets.returns is None:
        return loss, sums
    value_loss, clipped = losses.value_terms(
        values,
        targets.old_values[micro, :width],
        targets.returns[micro, :width],
        mask,
        config.ppo.value_clip,
    )
    sums.value_loss = float(value_loss.detach())
    sums.value_clipped = float(clipped)
    return loss + config.ppo.value_coef * value_loss, sums


def _keep_policy(learner: nn.Module) -> None:
    """No gradient at all, so that neither momentum nor weight decay moves the policy."""
    for name, parameter in learner.named_parameters():
        if "value_head." not in name and "value_trunk." not in name:
            parameter.grad = None
