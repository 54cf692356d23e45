"""Options, arguments and output that commands share."""

import contextlib
import difflib
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from engine import starter
from engine.errors import NoSuchSessionError, UserInputError
from engine.journal.turns import Turn
from engine.session.command_line import SESSIONS_VARIABLE
from engine.session.folder import SessionFolder, all_sessions, find
from engine.session.registry import live_sessions, names_of
from rlhf_tui import format as fmt
from rlhf_tui import terminal_colors
from rlhf_tui.commands.shell_complete import complete_name, complete_override
from rlhf_tui.table_files import json_parts
from rlhf_tui.text import one_line, sanitise

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

SESSIONS = "The folder of sessions."
JSON = "Print one JSON value."
NAME_MAX, PATH_MAX = 255, 4000
"""Bytes of a name and of a path on Linux, less some for the files of a session."""


def _folder(context: click.Context, _option: click.Parameter, value: Path) -> Path:
    """The folder given to the command, or before it (`rlhf-tui --sessions DIR ls`)."""
    outer = context.find_root()
    if not _is_given(context) and _is_given(outer):
        value = outer.params["root"]
    longest = max((len(os.fsencode(part)) for part in value.parts), default=0)
    length = len(os.fsencode(value))
    with contextlib.suppress(FileNotFoundError):  # the current folder is gone
        length = len(os.fsencode(value.absolute()))
    if longest > NAME_MAX or length > PATH_MAX:
        raise UserInputError(
            f"--sessions: the path is too long (at most {NAME_MAX} bytes a name and {PATH_MAX} in "
            f"all): {str(value)[:40]}…"
        )
    try:
        value.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserInputError(f"--sessions: {value} is a loop of symbolic links") from error
    return value


def _is_given(context: click.Context) -> bool:
    return context.get_parameter_source("root") is ParameterSource.COMMANDLINE


def folder_is_given() -> bool:
    """Whether the command line has --sessions, so that the command is about that folder alone."""
    context = click.get_current_context(silent=True)
    while context is not None and not _is_given(context):
        context = context.parent
    return context is not None


def live_elsewhere() -> list[SessionFolder]:
    """This user's live sessions in any folder; none if --sessions says which one is meant."""
    return [] if folder_is_given() else live_sessions()


def utf8_text(_context: click.Context, parameter: click.Parameter, value: str) -> str:
    """A callback of arguments: their text is stored as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        name = parameter.human_readable_name
        raise UserInputError(f"{name} is not valid UTF-8; check the terminal's locale") from error
    return value


sessions_option: Decorator = click.option(
    "--sessions",
    "root",
    type=click.Path(path_type=Path),
    envvar=SESSIONS_VARIABLE,
    default=Path("sessions"),
    show_default="$RLHF_TUI_SESSIONS or ./sessions",
    callback=_folder,
    help=SESSIONS,
)

json_option: Decorator = click.option("--json", "as_json", is_flag=True, help=JSON)


class CountFrom(click.IntRange):
    """Whole numbers from a smallest one. Any larger than SQLite's is its largest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the number. Raises BadParameter."""
        return min(super().convert(value, param, ctx), 2**63 - 1)


last_option: Decorator = click.option(
    "--last", type=CountFrom(min=1), metavar="N", help="Print only the last N."
)


def _starter_file(_context: click.Context, _option: click.Parameter, value: str) -> Path:
    """The file of `starter:demo`; any other value as a path."""
    return Path(starter.resolve(value))


config_argument: Decorator = click.argument("config", type=click.Path(), callback=_starter_file)

override_option: Decorator = click.option(
    "-o",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a configuration key.",
    shell_complete=complete_override,
)


def _set_colors(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        os.environ[terminal_colors.VARIABLE] = value


colors_option: Decorator = click.option(
    "--colors",
    type=click.Choice(list(terminal_colors.SYSTEMS)),
    expose_value=False,
    callback=_set_colors,
    help="The terminal's colours, if detected wrongly.  [default: $RLHF_TUI_COLORS or auto]",
)


class FiniteRange(click.FloatRange):
    """A number in a range. `nan`, which is in every range of click, and `inf` are refused."""

    def convert(self, value: Any, parameter: Any, context: Any) -> float:
        """The number. Raises `click.BadParameter`."""
        number: float = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", parameter, context)
        return number


name_argument: Decorator = click.argument("name", shell_complete=complete_name)
optional_name_argument: Decorator = click.argument(
    "name", required=False, shell_complete=complete_name
)
"""For :func:`existing_or_live`."""


def existing(root: Path, name: str) -> SessionFolder:
    """The session called `name`, in `root` or, unless --sessions is given, live elsewhere.

    Raises:
        NoSuchSessionError: there is none; the message suggests similar names.
    """
    return existing_among(root, name, live_elsewhere())


def existing_among(root: Path, name: str, elsewhere: list[SessionFolder]) -> SessionFolder:
    """The session called `name`, in `root` or of `elsewhere`. Raises as :func:`existing`."""
    root = root.resolve()
    try:
        return find(root, name, elsewhere)
    except NoSuchSessionError:
        near = _similar(name, sorted({s.name for s in (*all_sessions(root), *elsewhere)}))
        ls = fmt.command("ls", root=root)
        known = f"did you mean {' or '.join(near)}? ({ls} lists all)"
        hint = known if near else f"list sessions with: {ls}"
        raise NoSuchSessionError(f"no session '{name}' in {root}; {hint}") from None


def existing_or_live(root: Path, name: str | None) -> SessionFolder:
    """The session called `name`; without a name the only live one, which stderr then names.

    Raises:
        NoSuchSessionError: as :func:`existing` and :func:`only_live`.
        UserInputError: there is no name, and several sessions are live.
    """
    if name:
        return existing(root, name)
    session = only_live(root)
    folder = one_line(str(session.folder.parent))
    click.echo(f"rlhf-tui: session {session.name} in {folder}", err=True)
    return session


def only_live(root: Path) -> SessionFolder:
    """The only live session of `root`; if it has none, the only one that is live elsewhere.

    Raises:
        NoSuchSessionError: none is live.
        UserInputError: several are live.
    """
    root = root.resolve()
    check_listable(root)
    sessions = all_sessions(root)
    live = [s for s in sessions if s.is_live()] or live_elsewhere()
    if len(live) == 1:
        return live[0]
    if live:
        raise UserInputError(f"several sessions are live, give one: {names_of(live)}")
    if not sessions:
        demo = fmt.command("demo", root=root)
        raise NoSuchSessionError(f"no sessions in {root}; start one with: {demo}")
    raise NoSuchSessionError(
        f"no live session in {root}; give the name of a finished one "
        f"({fmt.command('ls', root=root)}), or resume one: "
        f"{fmt.command('resume', 'NAME', root=root)}"
    )


def check_listable(root: Path) -> None:
    """Raises UserInputError for a file, and for a folder that this user may not list."""
    try:
        if root.is_file():
            raise UserInputError(f"{root} is a file; --sessions takes a folder of sessions")
        allowed = not root.is_dir() or os.access(root, os.R_OK | os.X_OK, effective_ids=True)
    except PermissionError:  # of a folder above it
        allowed = False
    if not allowed:
        raise UserInputError(
            f"cannot read {root}: Permission denied; ask its owner, or choose another folder with "
            "--sessions"
        )


def _similar(name: str, names: list[str]) -> list[str]:
    """At most three names that are close to `name` or contain it."""
    close = difflib.get_close_matches(name, names, n=3)
    return [*close, *(n for n in names if name in n and n not in close)][:3]


def print_json(value: Any) -> None:
    """Prints one JSON value, in ASCII: it cannot contain control sequences."""
    click.echo(json.dumps(value, allow_nan=False))


def print_json_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Prints one JSON list like :func:`print_json`, but without having all its text in memory."""
    for part in json_parts(rows):
        click.echo(part, nl=False)


Tone = Literal["", "good", "warn", "bad"]
COLOURS = {"good": "green", "warn": "yellow", "bad": "red"}


def say(*pieces: str | tuple[str, Tone]) -> None:
    """Prints a line of sanitised text on stdout. All output for people goes through it.

    A piece may have a tone, which is a colour on a terminal that has them.
    """
    coloured = has_colours()
    words = []
    for piece in pieces:
        text, tone = (piece, "") if isinstance(piece, str) else piece
        text = sanitise(text)
        words.append(click.style(text, fg=COLOURS[tone]) if coloured and tone else text)
    click.echo("".join(words))


def say_turns(before: str, turns: Sequence[Turn]) -> None:
    """Prints a response, each turn on a line of its own; `before` is on the line of the first."""
    first, *rest = turns
    say(f"  {before}{one_line(first.text)}")
    for turn in rest:
        say(f"  {'reply ' if turn.is_reply else 'policy'}│{one_line(turn.text)}")


def show_wait(text: str) -> None:
    """Prints on stderr, if it is a terminal, what a slow command is doing."""
    if sys.stderr.isatty():
        click.echo(f"{one_line(text)} …", err=True)


def has_colours() -> bool:
    """Whether stdout is a terminal on which colours are wanted (https://no-color.org)."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def why_no_terminal() -> str:
    """Why the terminal app cannot run here, if :func:`is_terminal` says that it cannot."""
    return "TERM is 'dumb'" if os.environ.get("TERM") == "dumb" else "this is not a terminal"


def is_terminal() -> bool:
    """Whether the terminal app can run here."""
    return sys.stdout.isatty() and sys.stdin.isatty() and os.environ.get("TERM") != "dumb"
