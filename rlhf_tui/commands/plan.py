"""What a run will take of the machine's memory, before it is started."""

import subprocess
import sys
import textwrap
from pathlib import Path

import click
import msgspec

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.errors import RlhfError, UserInputError
from engine.journal.json_values import Json
from engine.launch.environment import clean_environment
from engine.launch.start import check_inputs
from engine.memory.advice import can_start, changes_to_fit, fits
from engine.memory.capacity import Capacity, of_device
from engine.memory.estimate import estimate
from engine.memory.model import Estimate, Layout, Models, configured, layouts
from rlhf_tui.commands.options import json_option, override_option, print_json, say
from rlhf_tui.text import one_line

GB = 1e9
WIDTH = 80
"""Of a line: what every terminal has."""
NUMBER = 9
"""Width of a column; six of them and the labels stay within a line."""
ANSWER_TIMEOUT = 300.0
"""Seconds for the models' configurations to be read; one from the hub may have to come first."""
LABELS = {
    "process": "process",
    "CUDA context": "CUDA context",
    "policy": "policy",
    "optimiser": "optimiser (AdamW)",
    "value": "value function",
    "reference": "reference",
    "reward": "reward models",
    "gradients": "gradients",
    "activations": "activations",
    "logits": "logits",
    "KV cache": "KV cache",
    "gathered": "weights gathered",
    "casts": "bfloat16 copies",
    "loading": "weights read",
}
"""Parts in the order they are shown; what is always held first."""


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@override_option
@click.option("--processes", type=click.IntRange(min=2), metavar="N", help="Ranks of ddp and fsdp.")
@json_option
def plan(config: Path, overrides: tuple[str, ...], processes: int | None, as_json: bool) -> None:
    """Estimate what each rank of the run in CONFIG would hold in memory. Loads no weights."""
    loaded = config_file.load(config, overrides)
    check_inputs(loaded)
    models = look(loaded)
    capacity = of_device(models.device, loaded.launch.gpus)
    ranks = processes or _several(loaded, capacity)
    found = [estimate(loaded, models, layout) for layout in layouts(loaded, ranks)]
    mine = configured(loaded, _configured_ranks(loaded, capacity))
    if as_json:
        print_json(_as_data(loaded, models, capacity, found, mine))
        return
    say(_head(loaded, models))
    say(_table(found, capacity))
    say("")
    for line in _conclusion(loaded, models, capacity, found, mine):
        say(_wrapped(line))


def _wrapped(line: str) -> str:
    """Lines of WIDTH; an option stays with its value."""
    held = one_line(line).replace("-o ", "-o\0")
    return textwrap.fill(held, WIDTH, break_on_hyphens=False).replace("\0", " ")


def look(config: RunConfig) -> Models:
    """The shapes of the models, from a process that may import torch.

    Raises:
        UserInputError: a model or the prompts cannot be used.
        RlhfError: that process failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "engine.train.models.shapes"],
        input=msgspec.json.encode(config),
        env=clean_environment(),
        capture_output=True,
        timeout=ANSWER_TIMEOUT,
        check=False,
    )
    lines = done.stdout.splitlines() or [b""]
    if done.returncode:
        errors = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise RlhfError(f"the models' shapes could not be read: {errors[-1]}")
    answer = msgspec.json.decode(lines[-1])
    if "error" in answer:
        raise UserInputError(answer["error"])
    return msgspec.convert(answer, Models)


def _configured_ranks(config: RunConfig, capacity: Capacity) -> int:
    """How many ranks the run would have on this machine."""
    given = config.launch.processes
    return given if isinstance(given, int) else max(1, capacity.gpus)


def _several(config: RunConfig, capacity: Capacity) -> int:
    """How many ranks to show ddp and fsdp with: the run's, the machine's, or two."""
    return max(2, _configured_ranks(config, capacity), capacity.gpus)


def _head(config: RunConfig, models: Models) -> str:
    policy = f"{models.policy.parameters / 1e6:,.0f} M parameters"
    kind = "GPU" if models.device == "cuda" else "host"
    longest = "prompts of" if models.exact_prompts else "prompts of at most"
    return (
        f"{kind} memory of each rank, GB: {policy}, {config.model.dtype},\n"
        f"{longest} {models.prompt_tokens} tokens, answers of {config.rollout.max_new_tokens}"
    )


def _table(found: list[Estimate], capacity: Capacity) -> str:
    """Rows of parts, columns of layouts; each part at its largest, so the peak is below the sum."""
    titles = [_title(e.layout) for e in found]
    rows = []
    for part, label in LABELS.items():
        values = [e.parts.get(part, 0) for e in found]
        if any(values):
            rows.append([label, *(f"{v / GB:.2f}" if v else "–" for v in values)])
    rows.append(["peak of a step", *(f"{e.peak / GB:.2f}" for e in found)])
    rows.append(["… while", *(e.fullest for e in found)])
    rows.append(["fits here", *(_verdict(e, capacity) for e in found)])
    lines = [["", *(t[0] for t in titles)], ["", *(t[1] for t in titles)], *rows]
    widths = [max(NUMBER, *map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_row(line, widths) for line in lines)


def _verdict(found: Estimate, capacity: Capacity) -> str:
    if not fits(found, capacity):
        return "no"
    return "yes" if can_start(found.layout, capacity) else f"{found.layout.ranks} GPUs"


def _row(cells: list[str], widths: list[int]) -> str:
    """A label on the left, numbers on the right."""
    numbers = (c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))
    return " ".join([cells[0].ljust(widths[0]), *numbers]).rstrip()


def _title(layout: Layout) -> tuple[str, str]:
    """A column's head, in two lines."""
    if layout.lora_rank is None:
        return layout.title, ""
    return layout.title.removesuffix(" LoRA"), f"LoRA {layout.lora_rank}"


def _conclusion(
    config: RunConfig, models: Models, capacity: Capacity, found: list[Estimate], mine: Layout
) -> list[str]:
    """What would fit on this machine, and what to change where the run does not."""
    good = [e.layout.title for e in found if _verdict(e, capacity) == "yes"]
    which = "each" if len(good) == len(found) else ", ".join(good) or "none"
    lines = [f"{_machine(capacity)}. Of these layouts would fit: {which}."]
    own = estimate(config, models, mine)
    if fits(own, capacity):
        lines.append(f"As configured ({mine.title}) the run fits, with {own.peak / GB:.2f} GB.")
        return lines
    changes, smaller = changes_to_fit(config, models, mine, capacity)
    tried = " ".join(f"-o {c}" for c in changes)
    lines.append(f"As configured ({mine.title}) it needs {own.peak / GB:.2f} GB a rank.")
    if fits(smaller, capacity):
        lines.append(f"It would fit, with {smaller.peak / GB:.2f} GB, by: {tried}")
    else:
        lines.append(
            f"Even with {tried} it would need {smaller.peak / GB:.2f} GB: take a smaller model, "
            "or more memory."
        )
    return lines


def _machine(capacity: Capacity) -> str:
    total, free = f"{capacity.total / GB:.1f} GB", f"{capacity.free / GB:.1f} free now"
    if capacity.device == "cuda":
        many = f"{capacity.gpus} GPUs of" if capacity.gpus > 1 else "a GPU of"
        return f"This machine has {many} {total} ({free})"
    return f"This machine has {total} ({free})"


def _as_data(
    config: RunConfig, models: Models, capacity: Capacity, found: list[Estimate], mine: Layout
) -> Json:
    """Everything, for scripts; bytes."""
    own = estimate(config, models, mine)
    changes: list[str] = []
    smaller = own
    if not fits(own, capacity):
        changes, smaller = changes_to_fit(config, models, mine, capacity)
    return {
        "device": models.device,
        "capacity": {"total": capacity.total, "free": capacity.free, "gpus": capacity.gpus},
        "models": msgspec.to_builtins(models),
        "configured": _column(own, capacity),
        "layouts": [_column(e, capacity) for e in found],
        "changes": changes,
        "changed_peak": smaller.peak,
        "changed_fits": fits(smaller, capacity),
    }


def _column(found: Estimate, capacity: Capacity) -> Json:
    return {
        **msgspec.to_builtins(found.layout),
        "phases": found.phases,
        "peak": found.peak,
        "fullest": found.fullest,
        "fits": fits(found, capacity),
        "can_start": can_start(found.layout, capacity),
    }
