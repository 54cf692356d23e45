"""Commands that check: a configuration before it is run (check), and a session (verify)."""

import sys
from pathlib import Path

import click
import msgspec

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.journal.turns import turns_of
from engine.launch.environment import ranks_per_node
from engine.launch.inputs import check_inputs
from engine.launch.rollout.engine import check_rollout_engine
from engine.protocol.programs.check_result import CheckedSample, CheckResult, TimedStep
from engine.verification.verify import Contents
from engine.verification.verify import verify as verify_session
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    Tone,
    config_argument,
    existing,
    json_option,
    name_argument,
    override_option,
    print_json,
    say,
    sessions_option,
    show_wait,
)
from rlhf_tui.engine_program import run_engine_program
from rlhf_tui.text import one_line

MAX_TEXT = 200
"""Characters of a prompt or a response that are shown."""


@click.command()
@config_argument
@override_option
@json_option
def check(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Load all that a configuration names and take a small step.

    The step uses two prompts and calls the rewards as a run does. Starts no run and leaves nothing
    behind.
    """
    loaded = config_file.load(config, overrides)
    check_inputs(loaded)
    check_rollout_engine(loaded)
    show_wait("loading models and data, and taking a small step")
    result = run_engine_program(
        CheckResult, "engine.train.check",
        given=loaded, launch=loaded.launch, failed="the configuration cannot be tried",
    )  # fmt: skip
    if as_json:
        print_json(msgspec.to_builtins(result))
        return
    for text in result.warnings:
        say(("note      ", "warn"), one_line(text))
    for line in report(loaded, result):
        say(line)
    for sample in result.samples:
        say("")
        for line in sample_lines(sample):
            say(line)


def report(config: RunConfig, result: CheckResult) -> list[str]:
    """The lines that describe the tried step and estimate the run's time and memory."""
    ranks = ranks_per_node(config.launch) * config.launch.nodes
    batch = config.rollout.batch_size
    steps, larger = config.train.steps, result.larger_step
    tried = TimedStep(result.responses, result.step_seconds)
    seconds = step_estimate(tried, larger, batch / ranks)
    planned = result.planned_memory
    context = " with the CUDA context" if result.device.startswith("cuda") else ""
    phases = ", ".join(f"{name} {seconds:.2g}" for name, seconds in result.phases.items())
    ratio = "not measured" if result.ratio is None else f"{result.ratio:.4f}"
    parts = ", ".join(f"{name} {fmt.number(score)}" for name, score in result.sources.items())
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in result.prompts_left_out.items() if n)
    held_out = config.eval.holdout
    start = f"start     ratio {ratio}, KL {result.kl:z.4f}"
    return [
        f"policy    {result.policy_parameters / 1e6:,.1f} M parameters, "
        f"{result.trained_parameters / 1e6:,.1f} M of them trained; {result.dtype} on "
        f"{result.device}",
        f"prompts   {result.prompts:,}, the longest of {result.longest_prompt} tokens"
        + (f"; held out: {held_out:,}" if held_out else "")
        + (f"; left out: {left_out}" if left_out else ""),
        f"step      {fmt.plural(result.responses, 'response')} of "
        f"{result.response_tokens:.0f} tokens (at most {config.rollout.max_new_tokens}) to 2 "
        f"prompts of at most {fmt.plural(result.prompt_tokens, 'token')}",
        *turn_lines(result),
        f"{start}; sampled log-probabilities are those of a full pass",
        f"score     {fmt.number(result.score)}" + (f" ({parts})" if parts else ""),
        f"memory    {result.memory:.2f} GB for this step"
        + (
            ""
            if planned is None
            else f"; about {planned:.2f} GB{context} for one of {batch} responses"
        ),
        f"time      {result.step_seconds:.2g} s for this step ({phases})"
        + (f"; {larger.seconds:.2g} s for one of {larger.responses} responses" if larger else ""),
        f"the run   {fmt.plural(steps, 'step')} of {batch} responses on "
        f"{fmt.plural(ranks, 'rank')}: about {fmt.duration(steps * seconds)}",
    ]


def turn_lines(result: CheckResult) -> list[str]:
    """The line about turns and tool calls of a run with an environment."""
    if result.turns is None:
        return []
    line = f"turns     {result.turns:.1f} in a response"
    if result.tool_calls is not None:
        line += f", {result.tool_calls:.1f} tool calls"
    if result.failed_calls is not None:
        line += f", {100 * result.failed_calls:.0f} % of them failed"
    return [line]


def sample_lines(sample: CheckedSample) -> list[str]:
    """The lines of a response with its prompt; each reply of an environment is on its own line."""
    prompt = one_line(sample.prompt)
    if len(prompt) > MAX_TEXT:  # the beginning may be a description of tools
        prompt = f"…{prompt[1 - MAX_TEXT :]}"
    lines = [f"prompt    {prompt}"]
    for turn in turns_of(sample.response, sample.replies):
        name = "reply" if turn.is_reply else "response"
        lines.append(f"{name:<8}  {one_line(turn.text, MAX_TEXT)}")
    lines[-1] += f"  ({fmt.number(sample.score)})"
    return lines


def step_estimate(tried: TimedStep, larger: TimedStep | None, responses: float) -> float:
    """Estimates a step's seconds by a straight line through the two timed steps.

    It is too long rather than too short: the first responses add more time than later ones, which
    run in parallel with longer ones.

    Args:
        tried: the step on two prompts.
        larger: the step on more; without it each response is assumed to take the same time.
        responses: responses of a step of the run, per rank.
    """
    if larger is None or responses <= tried.responses:
        return tried.seconds * max(1.0, responses / tried.responses)
    added = max(0.0, larger.seconds - tried.seconds)
    each = added / (larger.responses - tried.responses)
    return larger.seconds + each * (responses - larger.responses)


@click.command()
@name_argument
@sessions_option
@json_option
def verify(root: Path, name: str, as_json: bool) -> None:
    """Check whether anything in a session is damaged or lost.

    Checks files, checkpoints, history, labels and access. Changes nothing; the session can be live.
    A problem is something that was damaged or lost, or that gives others access. A note is
    something that a crash leaves behind and a resume cleans up.
    """
    session = existing(root, name)
    verified = verify_session(session)
    if as_json:
        findings = msgspec.to_builtins(verified.findings)
        shown = {"name": name, "problems": verified.problems, "findings": findings}
        print_json(shown | msgspec.structs.asdict(verified.contents))
    else:
        for found in verified.findings:
            tone: Tone = "bad" if found.level == "problem" else "warn"
            say((found.level, tone), f": {found.check}: {found.text}; {found.advice}")
        say(f"{name}: {_checked(verified.contents)}: {_verdict(verified.problems)}")
    sys.exit(1 if verified.problems else 0)


def _checked(contents: Contents) -> str:
    words = ("checkpoint", "step", "command", "sample", "label")
    numbers = [fmt.plural(getattr(contents, f"{word}s"), word) for word in words]
    return f"{contents.state}, {', '.join(numbers)}"


def _verdict(problems: int) -> str:
    return fmt.plural(problems, "problem") if problems else "nothing is damaged or lost"
