"""One PPO step, from prompts to metrics."""

import time

from torch import Tensor

from engine.protocol.rank_messages import Sample
from engine.train.ppo.adamw import learning_rate
from engine.train.ppo.advantages import AdvantageInputs, make_targets
from engine.train.ppo.forward import longest_first, score_tokens
from engine.train.ppo.metrics import source_metrics, speed_metrics, step_metrics
from engine.train.ppo.optimise import optimise
from engine.train.reports.samples import kept_samples
from engine.train.rewards.normalise import Normaliser
from engine.train.rewards.source import RewardInputs
from engine.train.rollout.backend import SamplingOptions, generate_responses
from engine.train.rollout.rollout import ReportProgress, Rollout
from engine.train.rollout_check import check_first_rollout
from engine.train.run import Run


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
        run.checked = True

    # 4. Advantages, from the whole global batch.
    targets = make_targets(
        AdvantageInputs(
            scores=scores, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
            values=old_values, mask=rollout.mask, lengths=rollout.lengths, config=config.ppo,
            beta=config.kl.beta, per_prompt=config.answers_per_prompt, baseline=state.baseline,
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

    # 6. Metrics and samples.
    state.episodes += len(scores)
    metrics = step_metrics(rollout, scores, ref_logprobs, targets, done, config.kl.beta)
    metrics["episode"] = float(state.episodes)
    metrics["lr"] = learning_rate(config.train, step)
    metrics |= source_metrics(parts)
    clock.gather(run)
    metrics |= speed_metrics(clock.ranks, rollout, time.perf_counter() - began)
    kept: list[Sample] = []
    if ranks.is_lead:  # it tells of them, so the others need none
        kept = kept_samples(
            config.log, run.tokenizer, rollout, scores, parts, targets, ref_logprobs
        )
    return metrics, kept


def take_rollout(run: Run, step: int, report: ReportProgress) -> Rollout:
    """The policy's responses to the step's prompts."""
    rollout = run.config.rollout
    options = SamplingOptions(
        seed=run.state.sampling_seed,
        step=step,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        per_prompt=run.config.answers_per_prompt,
    )
    prompts = run.prompts.for_step(step)
    return generate_responses(
        run.backend, run.policy, prompts, options, run.tokenizer, run.ranks, report
    )


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
