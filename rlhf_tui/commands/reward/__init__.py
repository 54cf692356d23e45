"""The commands on a run's reward."""

import click

from rlhf_tui.commands.reward.agreement import agreement
from rlhf_tui.commands.reward.training import train
from rlhf_tui.commands.shell_complete import Group


@click.group(cls=Group, no_args_is_help=False)
def reward() -> None:
    """Train a reward model on judgements; measure agreement."""


reward.add_command(train)
reward.add_command(agreement)
