"""Generates responses, of several turns if the run has an environment."""

from engine.progress import ReportProgress, report_nothing
from engine.train.data.prompts import Prompt
from engine.train.environment.turn_loop import TurnLoop
from engine.train.models.language_model import AnyModel
from engine.train.rollout.backend import (
    OnResponse,
    SamplingOptions,
    TurnsBackend,
    generate_responses,
)
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run


def respond(
    run: Run,
    model: AnyModel,
    prompts: list[Prompt],
    options: SamplingOptions,
    report: ReportProgress = report_nothing,
    *,
    purpose: str | None = None,
    on_ended: OnResponse | None = None,
) -> Rollout:
    """Generates responses to prompts; the rollout holds all of them, on every rank.

    All ranks must call it; see :func:`generate_responses`.

    Args:
        run: the run; it is not changed.
        model: the policy or the reference, in evaluation mode.
        prompts: the prompts of the whole batch, the same on every rank.
        options: seed, step, temperature and lengths. `max_new_tokens` limits the tokens of the
            policy in all turns together.
        report: called with (tokens done, total), for each turn anew, and after each reply.
        purpose: what the responses are for, for errors of an environment and the log. Default: the
            step of the options.
        on_ended: without an environment, may be called with responses that have ended while others
            have not.

    Raises:
        RewardCallError: an environment raised, or the chat template cannot render its reply.
    """

    def generate(
        prompts: list[Prompt], options: SamplingOptions, on_ended: OnResponse | None = None
    ) -> Rollout:
        return generate_responses(
            run.backend, model, prompts, options, run.tokenizer, run.ranks, report,
            on_ended=on_ended,
        )  # fmt: skip

    if run.environments is None:
        return generate(prompts, options, on_ended)
    turns = TurnLoop(
        run.config, run.environments, run.tokenizer, options,
        purpose or f"step {options.step}", report,
    )  # fmt: skip
    independent = run.config.environment.turns == "independent" and model is run.policy
    if independent and isinstance(run.backend, TurnsBackend):
        run.backend.sync(model, options.weights_version, report)
        return turns.generate_independently(prompts, run.backend, run.ranks)
    return turns.generate(prompts, generate)
