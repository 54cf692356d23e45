"""The command that evaluates a checkpoint on held-out prompts: eval."""

from pathlib import Path

import click
import msgspec

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.errors import RlhfError, UserInputError
from engine.examined import examined
from engine.launch.start_checkpoints import check_step, checkpoint_steps
from engine.metrics import EVAL_TIME, describe
from engine.protocol.programs.evaluation_result import EvaluationResult
from engine.protocol.programs.result import ProgramNotice
from rlhf_tui import format as fmt
from rlhf_tui.commands.checkpoint_step import StepChoice, checkpoint_step, step_choice
from rlhf_tui.commands.options import (
    existing,
    json_option,
    name_argument,
    override_option,
    print_json,
    say,
    sessions_option,
    show_wait,
)
from rlhf_tui.commands.shell_complete import complete_step
from rlhf_tui.engine_program import run_engine_program
from rlhf_tui.text import one_line


@click.command("eval")
@name_argument
@sessions_option
@click.option(
    "--step", "choice", type=step_choice, shell_complete=complete_step, default="last",
    metavar="STEP", show_default=True,
    help="The checkpoint to evaluate, or last or best.",
)  # fmt: skip
@override_option
@json_option
def evaluate(
    root: Path, name: str, choice: StepChoice, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Evaluate a checkpoint on held-out prompts.

    Uses the section eval of the session's configuration and changes nothing in the session.
    """
    session = existing(root, name)
    session.check_owner()
    config = evaluation_config(session.config(), overrides)
    step = checkpoint_step(session, choice)
    check_step(session, step, checkpoint_steps(session))
    show_wait(f"evaluating the checkpoint of step {step}")
    result = run_engine_program(
        EvaluationResult, "engine.train.evaluation", str(session.folder), str(step),
        given=config, launch=config.launch, failed="the evaluation failed", on_line=_show_notice,
    )  # fmt: skip
    if as_json:
        print_json({"step": step, "metrics": result.metrics, "samples": result.samples})
    else:
        _print(step, result)
    if failed := result.failed:
        reasons, without = "; ".join(failed.values()), ", ".join(f"'{name}'" for name in failed)
        raise RlhfError(f"{reasons}; evaluated without {without}: evaluate again once it works")


def _print(step: int, result: EvaluationResult) -> None:
    count = fmt.plural(len(result.samples), "response")
    say(f"step {step}, {count} to held-out prompts")
    rows = [
        [metric, fmt.number(value, describe(metric).digits), describe(metric).unit]
        for metric, value in result.metrics.items()
        if metric != EVAL_TIME
    ]
    say(fmt.table(rows, ["metric", "value", "unit"]))


def evaluation_config(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """The configuration of an evaluation by one rank.

    Raises:
        ConfigError: an override is wrong.
        UserInputError: the configuration has no held-out prompts, or would hold out different
            prompts than the run did, which then trained on them.
    """
    trained, config = config, config_file.override(config, overrides)
    if config.eval.holdout > trained.eval.holdout:
        kept = trained.eval.holdout or "none"
        raise UserInputError(
            f"eval.holdout: {config.eval.holdout} prompts of data.prompts cannot be evaluated, as "
            f"the run held {kept} back and trained on the others: give others, "
            "-o eval.prompts=FILE -o eval.holdout=0"
        )
    if config.eval.holdout and config.seed != trained.seed:
        raise UserInputError(
            f"seed must be that of the run ({trained.seed}): it determines which prompts it held "
            "back (the seed of the evaluation is eval.seed)"
        )
    if config.eval.prompts is None and not config.eval.holdout:
        raise UserInputError(
            "this run has no held-out prompts; give some: -o eval.prompts=FILE (and -o eval.column)"
        )
    every = config.eval.every or 1
    launch = msgspec.structs.replace(config.launch, processes=1, nodes=1, rendezvous=None)
    evaluation = msgspec.structs.replace(config.eval, every=every)
    return msgspec.structs.replace(config, eval=evaluation, launch=launch)


def _show_notice(line: bytes) -> None:
    """Prints a line of the program on stderr if it is a notice, such as that a service is down."""
    if line.startswith(b'{"type":"notice"'):
        notice = msgspec.json.decode(line, type=examined(ProgramNotice))
        click.echo(one_line(notice.text), err=True)
