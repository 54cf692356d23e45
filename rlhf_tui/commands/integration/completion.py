"""The command that prints a shell's completion script: completion."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_RLHF_TUI_COMPLETE"
"""The variable by which the script asks click for completions."""
CORRECTIONS = {
    "bash": (
        ("COMPREPLY+=($value)", "COMPREPLY+=($value); [[ $value != *= ]] || compopt -o nospace"),
    ),
    "zsh": (
        (
            "compadd -U -V unsorted -a completions",
            "compadd -U -V unsorted -S '' -- ${(M)completions:#*=}; "
            "compadd -U -V unsorted -- ${completions:#*=}; return 0",
        ),
        (
            "    compdef ",
            "    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }\n"
            "    compdef ",
        ),
    ),
    "fish": (('string split ","', 'string split --max 1 ","'),),
}
"""What click's scripts lack: no space follows `key=`; zsh loads its completion system if ~/.zshrc
has not; fish cuts neither values nor their descriptions at their first comma."""


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
    for old, new in CORRECTIONS[shell]:
        script = script.replace(old, new)
    click.echo(script)
