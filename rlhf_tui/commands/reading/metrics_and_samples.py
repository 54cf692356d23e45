"""Commands that print what the steps of a session recorded: metrics, samples."""

from collections.abc import Iterable
from pathlib import Path

import click

from engine.journal.reader import JournalReader
from engine.journal.rows import SampleRow
from engine.journal.samples import SampleReader, with_judgements
from engine.metrics import (
    BETA,
    CLIP_FRACTION,
    ENTROPY,
    EVAL_KL,
    EVAL_SCORE,
    KL,
    RESPONSE_LENGTH,
    SCORE,
    STEP_TIME,
)
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    CountFrom,
    existing_or_live,
    json_option,
    last_option,
    optional_name_argument,
    say,
    say_turns,
    sessions_option,
)
from rlhf_tui.commands.reading.row_formats import format_options, printed_rows
from rlhf_tui.text import one_line

COLUMNS = {
    SCORE: "score",
    KL: "KL",
    BETA: "beta",
    CLIP_FRACTION: "clip fraction",
    ENTROPY: "entropy",
    RESPONSE_LENGTH: "length",
    STEP_TIME: "seconds",
}
"""Metrics that `metrics` prints, with their titles."""
HELD_OUT = {EVAL_SCORE: "held-out score", EVAL_KL: "held-out KL"}
"""Also printed if one of the steps has them."""
STEP_FIELDS = ("step", "attempt", "time")
SAMPLE_FIELDS = (
    "step", "index", "attempt", "prompt", "response", "score", "kl", "length", "ended",
    "weights_version", "replies", "label", "note",
)  # fmt: skip
"""The columns of every table of metrics and of samples; those of metrics and of reward sources
depend on the run."""


@click.command()
@optional_name_argument
@sessions_option
@last_option
@format_options
@json_option
def metrics(
    root: Path, name: str | None, last: int | None, form: str | None, output: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Print a session's metrics, one row per step.

    Without NAME: of the only live session. --format and --json print every metric.
    """
    form = "json" if as_json else form
    with JournalReader(existing_or_live(root, name)) as reader:
        found = reader.metrics.iter_rows(last, None if form or output else {*COLUMNS, *HELD_OUT})
    if printed_rows((r.as_json() for r in found), form, output, STEP_FIELDS):
        return
    rows = list(found)
    columns = COLUMNS | {k: t for k, t in HELD_OUT.items() if any(k in r.values for r in rows)}
    body = [[str(r.step), *(fmt.number(r.values.get(c)) for c in columns)] for r in rows]
    say(fmt.table(body, ["step", *columns.values()]))


@click.command()
@optional_name_argument
@sessions_option
@last_option
@click.option("--step", type=CountFrom(min=0), metavar="N", help="Print those of one step.")
@click.option("--eval", "held_out", is_flag=True, help="Print responses to held-out prompts.")
@format_options
@json_option
def samples(
    root: Path, name: str | None, last: int | None, step: int | None, held_out: bool,
    form: str | None, output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print samples: prompts, responses and scores.

    Prints the last 16, or all with --step, --format or --json. Without NAME: of the only live
    session.
    """
    session = existing_or_live(root, name)
    count = last if last or as_json or form or output or step is not None else 16
    form = "json" if as_json else form
    with SampleReader(session) as reader:
        found: Iterable[SampleRow]
        if held_out:
            found = reader.evaluated(step)[-count if count else 0 :]
        elif step is not None:
            found = with_judgements(session, reader.of_step(step)[-count if count else 0 :])
        else:
            found = with_judgements(session, reader.iter_newest(count))
        if printed_rows((r.as_json() for r in found), form, output, SAMPLE_FIELDS):
            return
        rows = list(found)
    if not rows:
        of_step = "" if step is None else f" of step {step}"
        say(("no responses to held-out prompts" if held_out else "no samples") + of_step)
    for row in rows:
        score, kl = fmt.number(row.score), fmt.number(row.kl, 2)
        label = f"  {row.label}" if row.label else ""
        turns = "" if row.replies is None else f"  {fmt.plural(len(row.replies) + 1, 'turn')}"
        say(f"step {row.step} #{row.index}  score {score}  KL {kl}{turns}{label}")
        say_turns(f"{one_line(row.prompt)}│", row.turns)
        if row.note:
            say(f"  note: {one_line(row.note)}")
