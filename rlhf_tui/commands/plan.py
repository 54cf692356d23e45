"""The command that estimates a run's memory before it starts: plan."""

import re
import textwrap
from pathlib import Path
from typing import Any

import click
import msgspec

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.journal.json_values import Json
from engine.launch.inputs import check_files
from engine.launch.packages import missing_packages
from engine.memory.advice import (
    can_start,
    changes_to_fit,
    fits,
    layout_at_start,
    room_for_micro_batch,
)
from engine.memory.capacity import Capacity, of_device, supposed_gpus
from engine.memory.estimate import estimate
from engine.memory.model import Estimate, Layout, Models, layouts
from engine.memory.rollout_engine import beside_ranks, engine_memory
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    config_argument,
    json_option,
    override_option,
    print_json,
    say,
    show_wait,
)
from rlhf_tui.engine_program import run_engine_program
from rlhf_tui.text import one_line

GB = 1e9
WIDTH = 80
"""Columns of a line."""
NUMBER_WIDTH = 9
"""Columns of a number; six of them and the labels fit on a line."""
GATHERED_SHARE = 0.25
"""Share of the memory: if fsdp gathers more weights than that, a line says so."""


class GpusType(click.ParamType[tuple[int, float]]):
    """The number of GPUs and the memory of each in 10⁹ bytes, as in `8x80`."""

    name = "gpus"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        """Parses the text."""
        match = re.fullmatch(r"(\d{1,4})[x×](\d{1,5}(?:\.\d+)?)", str(value))
        if match is None or not int(match[1]) or not float(match[2]):
            self.fail(f"{value!r} is not a number of GPUs and GB, such as 8x80", param, ctx)
        return int(match[1]), float(match[2])


GPUS = GpusType()
LABELS = {
    "process": "process",
    "CUDA context": "CUDA context",
    "policy": "policy",
    "optimiser": "optimiser (AdamW)",
    "value": "value function",
    "average": "averaged policy",
    "reference": "reference",
    "reward": "reward models",
    "gradients": "gradients",
    "activations": "activations",
    "heap": "gaps in the heap",
    "logits": "logits",
    "KV cache": "KV cache",
    "gathered": "weights gathered",
    "casts": "converted copies",
    "states": "states for values",
    "system": "fit of the values",
    "loading": "weights read",
}
"""Label by part, in the order of the rows: parts that are held throughout a step come first."""


@click.command()
@config_argument
@override_option
@click.option(
    "--processes",
    type=click.IntRange(min=2),
    metavar="N",
    help="Ranks of the ddp and fsdp layouts.",
)
@click.option(
    "--gpus",
    "supposed",
    type=GPUS,
    metavar="NxGB",
    help="Plan for N GPUs of this size on each machine, such as 8x80, instead of for this machine.",
)
@json_option
def plan(
    config: Path,
    overrides: tuple[str, ...],
    processes: int | None,
    supposed: tuple[int, float] | None,
    as_json: bool,
) -> None:
    """Estimate the memory that each rank of a run needs.

    Loads no weights.
    """
    loaded = config_file.load(config, overrides)
    check_files(loaded)
    show_wait("reading the models' shapes and the prompts' lengths")
    given = loaded
    if supposed is not None:  # this machine may have no GPU, or others
        launch = msgspec.structs.replace(loaded.launch, device="cpu", gpus=[])
        given = msgspec.structs.replace(loaded, launch=launch)
    models = run_engine_program(
        Models, "engine.train.models.shapes", *([] if supposed is None else ["cuda"]),
        given=given, launch=given.launch, failed="the models' shapes cannot be read",
    )  # fmt: skip
    if supposed is None:
        memory = of_device(models.device, loaded.launch.gpus)
    else:
        memory = supposed_gpus(*supposed)
    left = memory.less(beside_ranks(loaded, models))
    capacity = msgspec.structs.replace(left, nodes=loaded.launch.nodes)
    ranks = processes or _several(loaded, capacity)
    estimates = [estimate(loaded, models, layout) for layout in layouts(loaded, ranks)]
    layout = layout_at_start(loaded, models, _configured_ranks(loaded, capacity), capacity)
    if as_json:
        print_json(_as_data(loaded, models, capacity, estimates, layout))
        return
    say(_head(loaded, models))
    say(_table(estimates, capacity))
    say("")
    for line in _engine_lines(loaded, models):
        say(_wrapped(line))
    for line in _conclusion(loaded, models, capacity, estimates, layout):
        say(_wrapped(line))
    for line in missing_packages(loaded) if supposed is None else []:
        say(_wrapped(f"A run on this machine would be refused: {line}"))


def _wrapped(line: str) -> str:
    """Wraps at WIDTH, but never between an option and its value."""
    unbroken = one_line(line).replace("-o ", "-o\0")
    return textwrap.fill(unbroken, WIDTH, break_on_hyphens=False).replace("\0", " ")


def _configured_ranks(config: RunConfig, capacity: Capacity) -> int:
    """The number of ranks that the run would have, on all machines."""
    given = config.launch.processes
    here = given if isinstance(given, int) else max(1, capacity.gpus)
    return here * capacity.nodes


def _several(config: RunConfig, capacity: Capacity) -> int:
    """The number of ranks in the ddp and fsdp columns: the run's, one per GPU, or two."""
    return max(2, _configured_ranks(config, capacity), capacity.gpus * capacity.nodes)


def _head(config: RunConfig, models: Models) -> str:
    millions = models.policy.parameters / 1e6
    policy = f"{millions:,.{0 if millions >= 10 else 1}f} M parameters"
    kind = "GPU" if models.device == "cuda" else "host"
    longest = "prompts of" if models.exact_prompts else "prompts of at most"
    replies = f", replies of {config.reply_tokens}" if config.reply_tokens else ""
    return (
        f"{kind} memory of each rank, GB: {policy}, {config.model.dtype},\n"
        f"{longest} {models.prompt_tokens} tokens, responses of {config.rollout.max_new_tokens}"
        f"{replies}"
    )


def _table(estimates: list[Estimate], capacity: Capacity) -> str:
    """A row per part, a column per layout.

    Each part has its maximum; these do not coincide, so the peak is below their sum.
    """
    titles = [_title(e.layout) for e in estimates]
    rows = []
    for part, label in LABELS.items():
        values = [e.parts.get(part, 0) for e in estimates]
        if any(values):
            rows.append([label, *(f"{v / GB:.2f}" if v else "–" for v in values)])
    rows.append(["peak of a step", *(f"{e.peak / GB:.2f}" for e in estimates)])
    rows.append(["… during", *(e.fullest for e in estimates)])
    rows.append(
        ["fits" if capacity.supposed else "fits here", *(_verdict(e, capacity) for e in estimates)]
    )
    lines = [["", *(t[0] for t in titles)], ["", *(t[1] for t in titles)], *rows]
    widths = [max(NUMBER_WIDTH, *map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_row(line, widths) for line in lines)


def _verdict(result: Estimate, capacity: Capacity) -> str:
    """`yes`, `no`, or the number of GPUs that the layout would need here."""
    if not fits(result, capacity):
        return "no"
    return "yes" if can_start(result.layout, capacity) else f"{result.layout.ranks} GPUs"


def _row(cells: list[str], widths: list[int]) -> str:
    """The label left-aligned, numbers right-aligned."""
    numbers = (c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))
    return " ".join([cells[0].ljust(widths[0]), *numbers]).rstrip()


def _title(layout: Layout) -> tuple[str, str]:
    """The two lines of a column's header."""
    if layout.lora_rank is None:
        return layout.title, ""
    return layout.title.removesuffix(" LoRA"), f"LoRA {layout.lora_rank}"


def _conclusion(
    config: RunConfig,
    models: Models,
    capacity: Capacity,
    estimates: list[Estimate],
    layout: Layout,
) -> list[str]:
    """Which layouts fit on this machine, and the changes with which the configured one would."""
    fitting = [e.layout.title for e in estimates if _verdict(e, capacity) == "yes"]
    which = "all" if len(fitting) == len(estimates) else ", ".join(fitting) or "none"
    lines = [f"{_machine(capacity)}. Layouts that fit: {which}."]
    gathered = max((e.parts.get("gathered", 0) for e in estimates), default=0)
    if gathered > GATHERED_SHARE * capacity.total:
        lines.append(
            f"fsdp gathers {gathered / GB:.1f} GB of weights on each rank to generate responses, "
            "however many ranks there are: more ranks do not reduce this."
        )
    current = estimate(config, models, layout)
    peak = f"{current.peak / GB:.2f} GB"
    if fits(current, capacity):
        lines.append(f"As configured ({layout.title}) the run fits: {peak} per rank.")
        micro_batch = room_for_micro_batch(config, models, layout, capacity)
        if micro_batch is not None:
            lines.append(
                f"There is room for -o ppo.micro_batch_size={micro_batch}, with the same result in "
                "fewer and larger kernels: faster if the model is small for the GPU."
            )
        return lines
    changes, smaller = changes_to_fit(config, models, layout, capacity)
    options = " ".join(f"-o {c}" for c in changes)
    lines.append(f"As configured ({layout.title}) the run needs {peak} per rank.")
    if fits(smaller, capacity):
        lines.append(f"It fits, with {smaller.peak / GB:.2f} GB per rank, with: {options}")
    elif changes:
        lines.append(
            f"Even with {options} it needs {smaller.peak / GB:.2f} GB per rank: "
            "use a smaller model or more memory."
        )
    else:
        lines.append("No setting would lower this: use a smaller model or more memory.")
    return lines


def _engine_lines(config: RunConfig, models: Models) -> list[str]:
    """The memory of a separate rollout engine; empty for native rollouts."""
    parts = engine_memory(config, models)
    if not parts:
        return []
    named = {
        "weights": "weights",
        "cache": "key-value cache",
        "program": "the program (host)",
        "handover": "weights handed over (host)",
    }
    listed = ", ".join(f"{label} {parts[key] / GB:.2f}" for key, label in named.items())
    where = "beside the ranks" if beside_ranks(config, models) else "on separate GPUs"
    count = config.rollout.engines
    who = "vLLM" if count == 1 else f"Each of {count} vLLM engines"
    once = " The handed-over weights are shared by all." if count > 1 and parts["handover"] else ""
    return [f"{who} needs {where}, GB: {listed}.{once} The ranks' share follows."]


def _machine(capacity: Capacity) -> str:
    total, free = f"{capacity.total / GB:.1f} GB", f"{capacity.free / GB:.1f} free now"
    others = f"; the ranks are on {capacity.nodes} such machines" if capacity.nodes > 1 else ""
    if capacity.supposed:
        of = f"{fmt.plural(capacity.gpus, 'GPU')} of {total}"
        return f"Planned for {of}" + (f" on each of {capacity.nodes} machines" if others else "")
    if capacity.device == "cuda":
        gpus = f"{capacity.gpus} GPUs of" if capacity.gpus > 1 else "a GPU of"
        return f"This machine has {gpus} {total} ({free}){others}"
    return f"This machine has {total} ({free}){others}"


def _as_data(
    config: RunConfig,
    models: Models,
    capacity: Capacity,
    estimates: list[Estimate],
    layout: Layout,
) -> Json:
    """The object that --json prints; sizes in bytes."""
    current = estimate(config, models, layout)
    changes: list[str] = []
    smaller = current
    if not fits(current, capacity):
        changes, smaller = changes_to_fit(config, models, layout, capacity)
    return {
        "device": models.device,
        "capacity": {
            "total": capacity.total,
            "free": capacity.free,
            "gpus": capacity.gpus,
            "nodes": capacity.nodes,
        },
        "models": msgspec.to_builtins(models),
        "configured": _column(current, capacity),
        "rollout_engine": engine_memory(config, models),
        "rollout_engines": config.rollout.engines if config.rollout.uses_vllm else 0,
        "layouts": [_column(e, capacity) for e in estimates],
        "changes": changes,
        "changed_peak": smaller.peak,
        "changed_fits": fits(smaller, capacity),
        "missing_packages": missing_packages(config),
    }


def _column(result: Estimate, capacity: Capacity) -> Json:
    return {
        **msgspec.to_builtins(result.layout),
        "phases": result.phases,
        "peak": result.peak,
        "fullest": result.fullest,
        "fits": fits(result, capacity),
        "can_start": can_start(result.layout, capacity),
    }
