"""The command that prints a shell's completion script: completion."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_RLHF_TUI_COMPLETE"
"""The variable by which the script asks click for completions."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for a SHELL.

    \b
    bash:  eval "$(rlhf-tui completion bash)"      in ~/.bashrc
    zsh:   eval "$(rlhf-tui completion zsh)"       in ~/.zshrc
    fish:  rlhf-tui completion fish | source       in config.fish
    """  # noqa: D301 - \b keeps click from joining the lines
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"this version of click has no completion for {shell}")
    root = context.find_root()
    script = kind(root.command, {}, "rlhf-tui", VARIABLE).source()
    # click's script for fish cuts values and their descriptions at their first comma.
    click.echo(script.replace('string split ","', 'string split --max 1 ","'))
