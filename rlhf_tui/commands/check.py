"""The command that tries a configuration before it is run: check."""

import subprocess
import sys
from pathlib import Path

import click
import msgspec

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.errors import RlhfError, UserInputError
from engine.launch.environment import clean_environment, rank_environment, ranks_per_node
from engine.launch.rollout import check_rollout_python
from engine.launch.start import check_inputs
from engine.protocol.check_result import CheckResult
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import json_option, override_option, print_json, say
from rlhf_tui.text import one_line

LONGEST_TEXT = 200
"""Characters of a prompt or a response that are shown."""


class _Failure(msgspec.Struct):
    """What the process prints instead of a result."""

    error: str
    exit_code: int


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@override_option
@json_option
def check(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Try a configuration: load everything and take a step on two prompts.

    Starts no run and leaves nothing behind. Rewards are called as in a run.
    """
    loaded = config_file.load(config, overrides)
    check_inputs(loaded)
    check_rollout_python(loaded.rollout)
    result = try_out(loaded)
    if as_json:
        print_json(msgspec.to_builtins(result))
        return
    for text in result.warnings:
        say(("note      ", "warn"), one_line(text))
    for line in report(loaded, result):
        say(line)
    for sample in result.samples:
        say("")
        say("prompt    ", one_line(sample.prompt, LONGEST_TEXT))
        response = one_line(sample.response, LONGEST_TEXT)
        say("response  ", f"{response}  ({fmt.number(sample.score)})")


def try_out(config: RunConfig) -> CheckResult:
    """Tries the configuration in a subprocess, as this process never imports torch.

    Raises:
        UserInputError: something that the configuration names cannot be used.
        RlhfError: the step or the subprocess failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "engine.train.check"],
        input=msgspec.json.encode(config),
        env=clean_environment() | rank_environment(config.launch),
        capture_output=True,
        check=False,
    )
    lines = done.stdout.splitlines() or [b""]
    if done.returncode or not lines[-1].startswith(b"{"):
        errors = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise RlhfError(f"the configuration cannot be tried: {errors[-1]}")
    if lines[-1].startswith(b'{"error"'):
        failure = msgspec.json.decode(lines[-1], type=_Failure)
        kind = UserInputError if failure.exit_code == UserInputError.exit_code else RlhfError
        raise kind(failure.error)
    return msgspec.json.decode(lines[-1], type=CheckResult)


def report(config: RunConfig, result: CheckResult) -> list[str]:
    """The lines that describe the tried step, and what the run will take."""
    ranks = ranks_per_node(config.launch) * config.launch.nodes
    batch = config.rollout.batch_size
    # A GPU generates more responses in nearly the same time, a CPU in proportion.
    longest = result.step_seconds * max(1.0, batch / result.responses / ranks)
    steps = config.train.steps
    planned = result.planned_memory
    phases = ", ".join(f"{name} {seconds:.2g}" for name, seconds in result.phases.items())
    ratio = "not measured" if result.ratio is None else f"{result.ratio:.4f}"
    parts = ", ".join(f"{name} {fmt.number(score)}" for name, score in result.sources.items())
    start = f"start     ratio {ratio}, KL {result.kl:.4f}"
    return [
        f"policy    {result.policy_parameters / 1e6:,.1f} M parameters, "
        f"{result.trained_parameters / 1e6:,.1f} M of them trained; {result.dtype} on "
        f"{result.device}",
        f"prompts   {result.prompts:,}, the longest of {result.longest_prompt} tokens",
        f"step      {fmt.plural(result.responses, 'response')} of "
        f"{result.response_tokens:.0f} tokens (at most {config.rollout.max_new_tokens}) to two "
        f"prompts of up to {result.prompt_tokens}",
        f"{start}; sampled log-probabilities are those of a full pass",
        f"score     {fmt.number(result.score)}" + (f" ({parts})" if parts else ""),
        f"memory    {result.memory:.2f} GB for this step"
        + ("" if planned is None else f"; about {planned:.2f} GB for one of {batch} responses"),
        f"time      {result.step_seconds:.2g} s for this step ({phases})",
        f"the run   {fmt.plural(steps, 'step')} of {batch} responses on "
        f"{fmt.plural(ranks, 'rank')}: between {fmt.duration(steps * result.step_seconds)} and "
        f"{fmt.duration(steps * longest)}",
    ]
