"""Generates the responses of a step, in this step or during the one before."""

import dataclasses

from engine.progress import ReportProgress, report_nothing
from engine.train.data.prompts import Prompt
from engine.train.experience.respond import respond
from engine.train.rollout.backend import SamplingOptions
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run


def obtain_rollout(run: Run, step: int) -> Rollout:
    """Returns the rollout of a step, generated ahead or now."""
    if run.ahead is not None:
        with run.phase(step, "generate") as report:
            rollout = run.ahead.take(sampling_options(run, step), report)
        if rollout is not None:
            return rollout
    if run.backend.separate:
        with run.phase(step, "sync") as report:
            run.backend.sync(run.policy, step - 1, report)
    with run.phase(step, "generate") as report:
        return generate_rollout(run, step, report)


def begin_next_rollout(run: Run, step: int) -> None:
    """Starts generating the next step's responses during the rest of this step (`rollout.ahead`).

    Does nothing after the last step, or if a checkpoint follows this step: responses after a
    checkpoint are generated with its weights, so that a run resumed from it trains on the same
    responses as the run that saved it.
    """
    train = run.config.train
    if run.ahead is None or step >= train.steps or train.saves_after(step):
        return
    options = dataclasses.replace(sampling_options(run, step + 1), weights_version=step - 1)
    with run.phase(step, "sync") as report:
        run.ahead.begin(run.prompts.for_step(step + 1), options, report)


def generate_rollout(run: Run, step: int, report: ReportProgress = report_nothing) -> Rollout:
    """Generates the policy's responses to the prompts of a step, on every rank."""
    prompts, options = run.prompts.for_step(step), sampling_options(run, step)
    return respond(run, run.policy, prompts, options, report, on_ended=run.ask_early)


def generate(run: Run, step: int, prompts: list[Prompt], options: SamplingOptions) -> Rollout:
    """Generates more responses within a step, on every rank, as another `generate` phase."""
    with run.phase(step, "generate") as report:
        return respond(run, run.policy, prompts, options, report, on_ended=run.ask_early)


def sampling_options(run: Run, step: int) -> SamplingOptions:
    """Returns the sampling options of a step."""
    rollout = run.config.rollout
    return SamplingOptions(
        seed=run.state.sampling_seed,
        step=step,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        weights_version=step - 1,
        per_prompt=run.config.responses_per_prompt,
    )
