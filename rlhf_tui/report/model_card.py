"""The card of an exported policy: README.md in its folder, with the header that the hub reads.

A card is meant to be published, so it reveals nothing about the machine or the people: only the
last part of paths, no addresses, no users.
"""

import re
from pathlib import Path

from msgspec import Struct

from engine import __version__
from engine.config.schema import RunConfig
from engine.config.sections.reward import RewardSource
from engine.journal.reader import JournalReader
from engine.metrics import STEP_TIME, title_of
from engine.session.folder import SessionFolder
from rlhf_tui.format import plural
from rlhf_tui.report import sections
from rlhf_tui.report.data import reached_steps
from rlhf_tui.report.headlines import STEPS_AVERAGED, read_headlines, read_held_out
from rlhf_tui.report.markdown import fenced, table, text
from rlhf_tui.report.settings import Setting, settings_of_run
from rlhf_tui.state.timeline import timeline

CARD = "README.md"
SECTIONS = ("ppo", "kl", "lora", "rollout", "train")
"""Sections of the configuration whose keys are listed."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class ExportedPolicy(Struct, frozen=True):
    """The kind of policy that a folder holds."""

    step: int
    averaged: bool = False
    """Whether it is the average of `train.ema`."""
    adapters: bool = False
    """Whether the folder has adapters without the model under them."""


def model_card(session: SessionFolder, policy: ExportedPolicy) -> str:
    """The card in Markdown.

    Raises:
        RlhfError: the journal or the configuration cannot be read.
    """
    config = session.config()
    with JournalReader(session) as reader:
        found = read_headlines(reader, policy.step)
        held_out = read_held_out(reader, policy.step)
        markers = timeline(
            reader.events(),
            reader.commands(),
            reader.attempts(),
            reached=reached_steps(reader),
        )
    headlines = [h for h in found if h.title != title_of(STEP_TIME)]
    changes = [
        [f"{m.step:,}", m.text]
        for m in markers
        if m.kind == "command" and not m.abandoned and m.step <= policy.step
    ]
    parts = [
        _header(config, policy),
        f"# {text(session.name)}, step {policy.step:,}\n",
        _introduction(config, policy),
        "## Training\n",
        _facts(config, policy),
        "Keys that differ from the defaults:\n",
        table(sections.values_and_defaults(_settings(config))) or "None.\n",
        "## Results\n",
        f"Means of the first and of the last {STEPS_AVERAGED} steps up to this one; beta is the KL "
        "coefficient.\n",
        table(sections.means(headlines)),
    ]
    if held_out:
        parts += ["On held-out prompts:\n", table(sections.evaluations(held_out))]
    if changes:
        parts += ["## Changes during training\n",
                  table(sections.limited(["step", "change"], changes))]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _header(config: RunConfig, policy: ExportedPolicy) -> str:
    lines = [
        f"library_name: {'peft' if policy.adapters else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [rlhf, reinforcement-learning, rlhf-tui]",
    ]
    if _is_hub_id(config.model.policy):
        lines.insert(0, f"base_model: {config.model.policy}")
    data_sets = [source.path for source in config.data.sources if _is_hub_id(source.path)]
    if data_sets:
        lines.append(f"datasets: [{', '.join(data_sets)}]")
    return "\n".join(["---", *lines, "---\n"])


def _introduction(config: RunConfig, policy: ExportedPolicy) -> str:
    what = "The averaged policy" if policy.averaged else "The policy"
    form = ""
    if policy.adapters:
        form = " The folder has LoRA adapters, which need that model."
    return (
        f"{what} after {plural(policy.step, 'step')} of training by reinforcement learning "
        f"(`ppo.advantage: {config.ppo.advantage}`) with rlhf-tui {__version__}, starting from "
        f"{_named(config.model.policy)}.{form}\n"
    )


def _facts(config: RunConfig, policy: ExportedPolicy) -> str:
    responses = policy.step * config.rollout.batch_size
    lines = [
        f"prompts: {', '.join(_named(source.path) for source in config.data.sources)}",
        f"rewards: {', '.join(map(_reward, config.reward.sources()))}",
        f"{responses:,} responses, {config.rollout.batch_size:,} per step, of at most "
        f"{config.rollout.max_new_tokens:,} tokens at temperature "
        f"{config.rollout.temperature:g}",
    ]
    if config.data.system:
        lines.append("each conversation began with the system message below")
    listed = "\n".join(f"- {line}" for line in lines) + "\n"
    return listed + (f"\n{fenced(config.data.system)}" if config.data.system else "")


def _reward(source: RewardSource) -> str:
    match source.kind:
        case "model":
            shown = f"the model {_named(source.value)}"
        case "function":
            shown = f"the function {text(source.value)}"
        case "judge":
            shown = f"the judge {text(source.judging.model or '')}".rstrip()
        case "environment":
            shown = f"the method {text(source.value)} of the environment"
        case kind:  # its value may hold what is nobody else's business, such as an address
            shown = f"a {kind}"
    return shown if source.weight == 1 else f"{source.weight:g} × {shown}"


def _settings(config: RunConfig) -> list[Setting]:
    """The keys of :data:`SECTIONS` that differ from the defaults, without paths and addresses."""
    return [
        setting
        for setting in settings_of_run(config)
        if setting.differs
        and setting.key.partition(".")[0] in SECTIONS
        and (isinstance(setting.value, bool | int | float) or _is_word(setting.value))
    ]


def _is_word(value: object) -> bool:
    """Whether it is a choice or a metric's name; paths are absolute, addresses have colons."""
    return isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_/]*", value) is not None


def _is_hub_id(name: str) -> bool:
    """Whether it names a model or a data set on the hub: local paths are absolute."""
    return _HUB_ID.fullmatch(name) is not None


def _named(name: str) -> str:
    """The name of a model, a data set or a file; the last part of a path."""
    return text(name if _is_hub_id(name) else Path(name).name)
