"""One PPO step, from prompts to metrics."""

import time

import msgspec

from engine.config.schema import RunConfig
from engine.protocol.rank_messages import Sample
from engine.train.experience.experience import collect_experience
from engine.train.experience.model_outputs import compute_outputs
from engine.train.experience.rollout_check import check_rollout
from engine.train.experience.targets import training_targets
from engine.train.ppo import masked
from engine.train.ppo.adamw import learning_rate
from engine.train.ppo.entropy import adapt, with_weight
from engine.train.ppo.metrics import speed_metrics, step_metrics
from engine.train.ppo.optimise import optimise
from engine.train.reports.samples import kept_samples
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run


def train_step(
    run: Run, step: int, recorded: Rollout | None = None
) -> tuple[dict[str, float], list[Sample]]:
    """Runs one PPO step: generate, score, compare with the reference, update the policy.

    Updates the policy, the optimiser and the running values of `run.state`. All ranks must call it.
    They share the forward and backward passes; everything in between, tensors of at most (B, T), is
    computed on every rank from the whole global batch.

    Args:
        run: the run.
        step: counted from 1. With the seed, it determines every random choice.
        recorded: a rollout to train on instead of generating one; used to compare runs.

    Returns:
        The step's metrics by name, and the samples to log (empty on ranks other than 0).
    """
    config, state, ranks = run.config, run.state, run.ranks
    started = time.perf_counter()
    run.times.seconds.clear()

    # 1. Generate responses and score them.
    experience = collect_experience(run, step, recorded)
    rollout = experience.rollout

    # 2. Log-probabilities of the reference and of the policy before the update.
    outputs = compute_outputs(run, step, rollout)
    if recorded is None:
        check_rollout(run, step, rollout, outputs.old_logprobs, outputs.ref_logprobs)

    # 3. Advantages and returns, from the whole global batch.
    targets = training_targets(run, step, experience, outputs)

    # 4. Epochs of clipped updates.
    if config.ppo.entropy_target is not None:
        config = with_adapted_entropy_bonus(run, rollout)
    with run.phase(step, "optimise") as report:
        stats = optimise(
            ranks, run.learner, run.optimiser, rollout, targets, config,
            seed=state.sampling_seed, step=step, report=report,
        )  # fmt: skip
    if run.average is not None:
        run.average.update(run.policy)

    # 5. Metrics and samples.
    state.episodes += len(experience.scores)
    metrics = step_metrics(rollout, experience.scores, outputs.ref_logprobs, targets, stats, config)
    metrics |= {"episode": float(state.episodes), "lr": learning_rate(config.train, step)}
    metrics |= experience.metrics(step, config.responses_per_prompt)
    run.gather_times()
    metrics |= speed_metrics(run.times.ranks, rollout, time.perf_counter() - started)
    if not ranks.is_lead:  # only rank 0 reports samples
        return metrics, []
    return metrics, kept_samples(
        config.log, run.tokenizer, rollout, experience.scores, experience.raw, targets,
        outputs.ref_logprobs,
    )  # fmt: skip


def with_adapted_entropy_bonus(run: Run, rollout: Rollout) -> RunConfig:
    """Adapts the weight of the entropy bonus to the policy's entropy before its update.

    Returns:
        The configuration in force, with that weight.
    """
    entropy = float(masked.masked_mean(rollout.entropies, rollout.mask))
    run.state.entropy_bonus = adapt(run.state.entropy_bonus, entropy, run.config.ppo)
    ppo = with_weight(run.config.ppo, run.state.entropy_bonus, entropy)
    return msgspec.structs.replace(run.config, ppo=ppo)
