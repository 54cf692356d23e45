"""What shells complete: commands, the names of sessions, steps of checkpoints, and keys."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from engine.config.settings import LIVE_SETTINGS
from engine.session.checkpoints import complete_checkpoints
from engine.session.command_line import sessions_folder
from engine.session.folder import SessionFolder, all_sessions, is_name
from engine.session.registry import live_sessions

MAX_DESCRIPTION = 1000
"""Characters of a description. Shells cut it at their width; click's limit is 45."""


class Group(click.Group):
    """A group whose commands are completed with their whole descriptions."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Returns the commands with this prefix."""
        found: list[CompletionItem] = super().shell_complete(ctx, incomplete)
        for item in found:
            if (command := self.get_command(ctx, item.value)) is not None:
                item.help = command.get_short_help_str(MAX_DESCRIPTION)
        return found


def complete_name(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """The names of sessions with a prefix.

    A shell inserts them as they are: one such as `x;rm *` would be a command.
    """
    return sorted(n for n in _sessions(context) if n.startswith(begun) and is_name(n))


def complete_step(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """`last`, `best` and the steps of the session's checkpoints, newest first."""
    steps = ["last", "best", *complete_saved_step(context, _parameter, begun)]
    return [step for step in steps if step.startswith(begun)]


def complete_saved_step(
    context: click.Context, _parameter: click.Parameter, begun: str
) -> list[str]:
    """The steps of the session's checkpoints, newest first."""
    session = _sessions(context).get(_name(context))
    try:
        steps = complete_checkpoints(session.checkpoints, lenient=True) if session else {}
    except OSError:
        return []
    return [str(step) for step in reversed(steps) if str(step).startswith(begun)]


def complete_setting(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """The settings that can change during a run, each as `key=`."""
    return [f"{key}=" for key in LIVE_SETTINGS if key.startswith(begun)]


def complete_override(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[str]:
    """The keys of a configuration, each as `key=`."""
    from engine.config.key_errors import known_keys  # noqa: PLC0415 - it needs the schema

    return [f"{key}=" for key in known_keys() if key.startswith(begun)]


def _sessions(context: click.Context) -> dict[str, SessionFolder]:
    """By name: those in the folder, and unless it is given those that are live elsewhere."""
    root: Any = _of_chain(context, "root") or sessions_folder()
    is_given = context.get_parameter_source("root") is ParameterSource.COMMANDLINE
    elsewhere = [] if is_given else live_sessions()
    return {s.name: s for s in (*elsewhere, *all_sessions(Path(root).resolve()))}


def _name(context: click.Context) -> str:
    """The session that the words before name; empty if there is none yet."""
    # click parses no arguments before an option without its value, as in `fork NAME --from`.
    names = _of_chain(context, "names") or context.args or [""]
    return str(_of_chain(context, "name") or names[0])


def _of_chain(context: click.Context | None, parameter: str) -> Any:
    """The value of a parameter of the command, or of one before it; None if there is none."""
    while context is not None:
        if (value := context.params.get(parameter)) is not None:
            return value
        context = context.parent
    return None
