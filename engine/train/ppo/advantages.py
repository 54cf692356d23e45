"""Advantage estimators, selected by `ppo.advantage`.

To add an estimator, declare its traits in :data:`engine.config.sections.ppo.ADVANTAGES`, write a
function from :class:`AdvantageInputs` to :class:`Targets`, and list it in :data:`ESTIMATORS`.

Shapes: B responses, T response tokens. Tensors are float32 unless their docstring says otherwise.

Sources: Schulman et al. 2016 (GAE); Ziegler et al. 2019, arXiv 1909.08593 (the KL in the reward);
Ahmadian et al. 2024 (RLOO); Shao et al. 2024, arXiv 2402.03300 (GRPO); Liu et al. 2025, arXiv
2503.20783 (Dr. GRPO); Tang et al. 2025, arXiv 2503.19595 (pass@k); Hao et al. 2025, arXiv
2505.23585 (OPO); Li et al. 2026, arXiv 2602.07078 (OTB); Hu 2025, arXiv 2501.03262 (REINFORCE++);
Li et al. 2023, arXiv 2310.10505 (ReMax); Yuan et al. 2025, arXiv 2503.01491 (VC-PPO) and Yue et al.
2025, arXiv 2504.05118 (VAPO); Huang et al. 2024, arXiv 2403.17031 (implementation details).
docs/ppo.md has the formulas.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config.sections.ppo import DEFAULT_LAM, PPOConfig
from engine.train.ppo import masked
from engine.train.ppo.kl_estimators import KL_ESTIMATORS

BASELINE_DECAY = 0.9
"""Decay of the exponential moving average of outcomes, for `ppo.baseline: running`."""


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator receives: the whole global batch, the same on every rank."""

    scores: Tensor
    """(B,): normalised and clipped, before the KL penalty."""
    old_logprobs: Tensor
    """(B, T): log π_old, of the policy that sampled."""
    ref_logprobs: Tensor
    """(B, T): log π_ref."""
    values: Tensor
    """(B, T): value estimate before each token; zeros without a value function."""
    mask: Tensor
    """(B, T) bool: true on response tokens."""
    lengths: Tensor
    """(B,) int64."""
    config: PPOConfig
    beta: float
    """The KL coefficient in the reward; 0 with `kl.place: loss`."""
    per_prompt: int
    """Number of adjacent rows that respond to the same prompt."""
    baseline: float | None
    """Moving average of earlier outcomes (`ppo.baseline: running`); None at the first step."""
    kl_estimator: str = "k1"
    """`kl.estimator`."""
    greedy_scores: Tensor | None = None
    """(B,): the score of a greedy response to the same prompt, processed like :attr:`scores`; set
    for estimators that declare `greedy_baseline`."""
    ended: Tensor | None = None
    """(B,) bool: false where a response was truncated; only needed for `ppo.mask_truncated`."""
    entropies: Tensor | None = None
    """(B, T): entropy of each token's distribution; only needed for `ppo.top_entropy`."""
    squared_probs: Tensor | None = None
    """(B, T): Σ π_old² over the vocabulary at each token; set for estimators that declare it."""
    turn_rewards: Tensor | None = None
    """(B, T): parts of :attr:`scores` that are given before the end of the response, on the last
    token of a turn; None if there are none."""

    @property
    def token_kl(self) -> Tensor:
        """Estimates each token's KL to the reference for the penalty; (B, T)."""
        log_ratio = (self.old_logprobs - self.ref_logprobs) * self.mask
        return KL_ESTIMATORS[self.kl_estimator](log_ratio) * self.mask

    @property
    def token_rewards(self) -> Tensor:
        """The reward of each token; (B, T)."""
        return token_rewards(self.scores, self.token_kl, self.lengths, self.beta, self.turn_rewards)

    @property
    def outcomes(self) -> Tensor:
        """Each score minus beta times the response's KL to the reference; (B,)."""
        return self.scores - self.beta * self.token_kl.sum(1)


@dataclass(frozen=True)
class Targets:
    """What the epochs train on; (B, T) each, 0 beyond a response's length."""

    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None
    """`old_values` and `returns` are None without a value function."""
    baseline: float | None = None
    """The moving average for the next step's :attr:`AdvantageInputs.baseline`; None: unchanged."""
    ref_logprobs: Tensor | None = None
    """log π_ref, for `kl.place: loss`; set by :func:`make_targets`."""
    token_weights: Tensor | None = None
    """Weight of each token in the policy loss, not negative; None is 1 for all. See
    :mod:`engine.train.ppo.rollout_correction`."""
    held_back: Tensor | None = None
    """bool: the tokens with a penalty on |log ρ|; None without `ppo.kl_cov`. See
    :mod:`engine.train.ppo.entropy`."""


def make_targets(inputs: AdvantageInputs) -> Targets:
    """Runs the configured estimator and post-processes its advantages.

    With `ppo.mask_truncated`, advantages of truncated responses are set to 0 (DAPO, section 3.4);
    their scores still count in group baselines and in whitening. With `ppo.top_entropy`, advantages
    of lower-entropy tokens are set to 0 (Wang et al. 2025, arXiv 2506.01939).
    """
    targets = ESTIMATORS[inputs.config.advantage](inputs)
    advantages = targets.advantages
    if inputs.config.whiten:
        whiten = masked.whiten if inputs.config.whiten_scale else masked.centre
        advantages = whiten(advantages, inputs.mask)
    if inputs.config.mask_truncated and inputs.ended is not None:
        advantages = advantages * inputs.ended[:, None]
    if inputs.config.top_entropy < 1 and inputs.entropies is not None:
        top = top_entropy(inputs.entropies, inputs.mask, inputs.config.top_entropy)
        advantages = advantages * top
    return dataclasses.replace(targets, advantages=advantages, ref_logprobs=inputs.ref_logprobs)


def top_entropy(entropies: Tensor, mask: Tensor, share: float) -> Tensor:
    """Selects the `share` of the mask's tokens with the highest entropies; (B, T) bool.

    Selects at least one token, and all tokens that tie with the lowest selected entropy.
    """
    values = entropies[mask]
    least = values.sort(descending=True).values[max(1, round(share * len(values))) - 1]
    return (entropies >= least) & mask


def gae(inputs: AdvantageInputs) -> Targets:
    """Generalised advantage estimation over token rewards (Schulman et al. 2016).

    Returns are advantages plus values, before the advantages are whitened.
    """
    config, mask, values = inputs.config, inputs.mask, inputs.values
    rewards = inputs.token_rewards
    if config.whiten_rewards:
        rewards = masked.whiten(rewards, mask, shift_mean=False)
    same = DEFAULT_LAM if config.lam is None else config.lam
    lam: float | Tensor = same
    if config.lam_alpha is not None:
        lam = length_adaptive_lambda(inputs.lengths, config.lam_alpha)
    advantages = generalised_advantages(rewards, values, mask, config.gamma, lam)
    of_value = advantages
    if config.lam_value is not None:
        of_value = generalised_advantages(rewards, values, mask, config.gamma, config.lam_value)
    elif config.lam_alpha is not None:
        of_value = generalised_advantages(rewards, values, mask, config.gamma, same)
    returns = (of_value + values) * mask
    return Targets(inputs.old_logprobs, advantages, values, returns)


def reward(inputs: AdvantageInputs) -> Targets:
    """REINFORCE (Williams 1992): each outcome minus `ppo.baseline`, on each response token."""
    outcomes = inputs.outcomes
    baseline, updated = _baseline(inputs, float(outcomes.mean()))
    advantages = (outcomes - baseline)[:, None] * inputs.mask
    return Targets(inputs.old_logprobs, advantages, baseline=updated)


def _baseline(inputs: AdvantageInputs, mean: float) -> tuple[float, float | None]:
    """Returns the baseline of this batch and :attr:`Targets.baseline`."""
    previous = inputs.baseline
    match inputs.config.baseline:
        case "none":
            return 0.0, None
        case "batch":
            return mean, None
        case "running":
            if previous is None:
                return mean, mean
            return previous, BASELINE_DECAY * previous + (1 - BASELINE_DECAY) * mean


def rloo(inputs: AdvantageInputs) -> Targets:
    """RLOO (Ahmadian et al. 2024): :func:`leave_one_out` outcomes, on each token."""
    advantages = leave_one_out(inputs.outcomes, inputs.per_prompt)
    return Targets(inputs.old_logprobs, advantages[:, None] * inputs.mask)


def grpo(inputs: AdvantageInputs) -> Targets:
    """GRPO (Shao et al. 2024): outcomes minus their group's mean, scaled, on each token."""
    advantages = group_advantages(inputs.outcomes, inputs.per_prompt, inputs.config.scale_rewards)
    return Targets(inputs.old_logprobs, advantages[:, None] * inputs.mask)


def grpo_passk(inputs: AdvantageInputs) -> Targets:
    """Pass@k (Tang et al. 2025): the best outcome of a group minus the second best, scaled.

    This is the advantage of each token of the best response; all others get 0. So the policy learns
    to produce at least one good response among `rollout.per_prompt`.
    """
    groups = inputs.outcomes.double().view(-1, inputs.per_prompt)  # see masked.whiten
    top = groups.topk(2, dim=1)
    lead = top.values[:, :1] - top.values[:, 1:]
    leads = torch.zeros_like(groups).scatter(1, top.indices[:, :1], lead)
    advantages = scaled(leads, groups, inputs.config.scale_rewards).view(-1, 1)
    return Targets(inputs.old_logprobs, advantages.to(inputs.scores.dtype) * inputs.mask)


def opo(inputs: AdvantageInputs) -> Targets:
    """OPO (Hao et al. 2025): outcomes minus their group's :func:`length_weighted_mean`."""
    outcomes = inputs.outcomes
    baseline = length_weighted_mean(outcomes, inputs.lengths, inputs.per_prompt)
    return Targets(inputs.old_logprobs, (outcomes - baseline)[:, None] * inputs.mask)


def optimal_token_baseline(inputs: AdvantageInputs) -> Targets:
    """OTB (Li et al. 2026): the sum of token rewards from each token on, minus a weighted mean.

    The mean at a token is over the group's responses that are as long. The weight of a response is
    Σ 1 − 2π + Σπ² over its tokens so far: the squared norm of the gradient of their log π with
    respect to the logits. Where only one response is left there is no baseline, as in verl.
    """
    if inputs.squared_probs is None:
        raise TypeError("optimal_token_baseline needs the sums of squared probabilities")
    mask = inputs.mask
    returns = rewards_to_go(inputs).double()
    norms = (1 - 2 * inputs.old_logprobs.double().exp() + inputs.squared_probs.double()) * mask
    weights = norms.cumsum(1) * mask
    shape = (-1, inputs.per_prompt, mask.shape[1])
    total = (weights * returns).view(shape).sum(1, keepdim=True)
    means = total / (weights.view(shape).sum(1, keepdim=True) + 1e-8)
    means = means * (mask.view(shape).sum(1, keepdim=True) > 1)
    advantages = (returns.view(shape) - means).view(mask.shape) * mask
    return Targets(inputs.old_logprobs, advantages.to(inputs.old_logprobs.dtype))


def reinforce_plus_plus(inputs: AdvantageInputs) -> Targets:
    """REINFORCE++ (Hu 2025): the sum of token rewards from each token on.

    Its baseline and scale are the batch's mean and standard deviation, applied by `ppo.whiten`.
    """
    return Targets(inputs.old_logprobs, rewards_to_go(inputs))


def remax(inputs: AdvantageInputs) -> Targets:
    """ReMax (Li et al. 2023): the sum of token rewards from each token on minus the greedy score.

    The baseline has no KL term, as in verl.
    """
    if inputs.greedy_scores is None:
        raise TypeError("remax needs greedy scores")
    advantages = rewards_to_go(inputs) - inputs.greedy_scores[:, None]
    return Targets(inputs.old_logprobs, advantages * inputs.mask)


def rewards_to_go(inputs: AdvantageInputs) -> Tensor:
    """The discounted sum of token rewards from each token on; (B, T)."""
    rewards = inputs.token_rewards
    zeros = torch.zeros_like(rewards)
    return generalised_advantages(rewards, zeros, inputs.mask, inputs.config.gamma, 1.0)


ESTIMATORS: dict[str, Callable[[AdvantageInputs], Targets]] = {
    "gae": gae,
    "reward": reward,
    "rloo": rloo,
    "grpo": grpo,
    "grpo_passk": grpo_passk,
    "opo": opo,
    "optimal_token_baseline": optimal_token_baseline,
    "reinforce_plus_plus": reinforce_plus_plus,
    "remax": remax,
}
"""Estimators by the names of :data:`engine.config.sections.ppo.ADVANTAGES`."""


def token_rewards(
    scores: Tensor, kl: Tensor, lengths: Tensor, beta: float, turn_rewards: Tensor | None = None
) -> Tensor:
    """Computes −β·KL (B, T) on every token plus the score (B,) on the last one; (B, T).

    This is the reward of Ziegler et al. 2019. The score is given on the last response token, as in
    OpenRLHF (`compute_reward`) and DeepSpeed-Chat, not on the padding after it. With rewards of
    turns, (B, T), these are given where they stand, and the last token gets what is left of the
    score, so that the sum is the same.
    """
    rewards = -beta * kl
    if turn_rewards is not None:
        rewards = rewards + turn_rewards
        scores = scores - turn_rewards.sum(1)
    last = (lengths - 1)[:, None]
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """λ = 1 − 1/(α·length) of each response, at least 0 (VAPO, section 3.2): (B,) → (B,).

    This makes Σ λ^t, the number of tokens a reward reaches, proportional to the length.
    """
    return (1 - 1 / (alpha * lengths.float())).clamp(min=0)


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """GAE (Schulman et al. 2016, eq. 16); (B, T).

    `lam` may be a tensor (B,) with one value per response. The value after the last token is 0. A
    token outside the mask neither ends the sum nor counts as a time step.
    """
    width = mask.shape[1]
    positions = torch.arange(width, device=mask.device)
    # Of each position on, the first token of the mask; T if there is none.
    first = torch.where(mask, positions, width).flip(1).cummin(1).values.flip(1)
    following = nn.functional.pad(first[:, 1:], (0, 1), value=width)
    next_values = nn.functional.pad(values, (0, 1)).gather(1, following)
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    decay = gamma * (lam[:, None] if isinstance(lam, Tensor) else lam)
    factors = torch.where(mask, decay, 1.0).to(deltas.dtype)
    return torch.where(mask, discounted_sums(deltas, factors), 0.0)


def discounted_sums(x: Tensor, factors: Tensor) -> Tensor:
    """y_t = x_t + factor_t·y_(t+1), with 0 after the last column; (B, T).

    Doubles the number of terms of each sum until they reach the end (Hillis and Steele 1986). A
    loop over the columns would launch T times as many kernels as one over their logarithm.
    """
    sums, terms = x.clone(), 1
    while terms < x.shape[1]:
        # The factors are those from each column to the one that is `terms` further.
        sums[:, :-terms].add_(factors[:, : x.shape[1] - terms] * sums[:, terms:])
        factors = factors[:, :-terms] * factors[:, terms:]
        terms *= 2
    return sums


def leave_one_out(returns: Tensor, per_prompt: int) -> Tensor:
    """Each return (B,) minus the mean return of the other responses to its prompt.

    The leave-one-out baseline of RLOO (Kool et al. 2019; Ahmadian et al. 2024). Responses to one
    prompt are in `per_prompt` adjacent rows; `per_prompt` is at least 2.
    """
    groups = returns.double().view(-1, per_prompt)  # see masked.whiten
    others = (groups.sum(1, keepdim=True) - groups) / (per_prompt - 1)
    return (groups - others).view(-1).to(returns.dtype)


def length_weighted_mean(returns: Tensor, lengths: Tensor, per_prompt: int) -> Tensor:
    """The mean of each prompt's returns (B,), weighted by the response lengths (B,); (B,).

    It is the minimum-variance baseline if a response's squared gradient grows with its length.
    Responses to one prompt are in `per_prompt` adjacent rows.
    """
    groups, weights = returns.double().view(-1, per_prompt), lengths.double().view(-1, per_prompt)
    means = (groups * weights).sum(1) / weights.sum(1)
    return means.repeat_interleave(per_prompt).to(returns.dtype)


def group_advantages(returns: Tensor, per_prompt: int, scale: str) -> Tensor:
    """Each return (B,) minus the mean of the responses to its prompt, :func:`scaled`.

    A group without variance gets advantages of 0. Responses to one prompt are in `per_prompt`
    adjacent rows.
    """
    groups = returns.double().view(-1, per_prompt)  # see masked.whiten
    centred = groups - groups.mean(1, keepdim=True)
    return scaled(centred, groups, scale).view(-1).to(returns.dtype)


def scaled(differences: Tensor, groups: Tensor, scale: str) -> Tensor:
    """Divides differences of returns by a standard deviation of the returns; (groups, n) each.

    `scale` is `ppo.scale_rewards`: `group` uses each group's standard deviation and `batch` that of
    all returns, with n − 1 in the denominator as in TRL and verl; `none` does not divide (Dr.
    GRPO).
    """
    match scale:
        case "group":
            return differences / (groups.std(1, keepdim=True) + masked.GROUP_STD_EPS)
        case "batch":
            return differences / (groups.std() + masked.GROUP_STD_EPS)
        case _:
            return differences


def constant_groups(scores: Tensor, per_prompt: int) -> Tensor:
    """Finds prompts whose responses all have the same score up to rounding: (B,) → (groups,) bool.

    The advantages of such a group are 0, so it has no effect on training.
    """
    groups = scores.view(-1, per_prompt)
    spread = groups.amax(1) - groups.amin(1)
    return spread <= 1e-6 * groups.abs().amax(1).clamp(min=1.0)
