"""Which colours the terminal has. Textual reads it from the environment when it is imported."""

from collections.abc import MutableMapping

from engine.errors import UserInputError

VARIABLE = "RLHF_TUI_COLORS"
SYSTEMS = {"auto": "auto", "truecolor": "truecolor", "256": "256", "16": "standard", "none": ""}
"""The user's name of a colour system → Textual's."""


def choose(environment: MutableMapping[str, str]) -> None:
    """Sets the environment for Textual. Call it before Textual is imported.

    Without a choice Textual relies on COLORTERM and the suffix of TERM. If SSH drops COLORTERM, it
    assumes 16 colours for a terminal such as `alacritty` or `foot`, whose terminfo entry says 256.

    Raises:
        UserInputError: the variable's value is not in :data:`SYSTEMS`.
    """
    wanted = environment.get(VARIABLE, "auto")
    if wanted not in SYSTEMS:
        raise UserInputError(f"{VARIABLE} must be one of {', '.join(SYSTEMS)}, not '{wanted}'")
    if wanted == "none":
        environment["NO_COLOR"] = "1"
    elif wanted != "auto":
        environment.pop("NO_COLOR", None)
        environment["TEXTUAL_COLOR_SYSTEM"] = SYSTEMS[wanted]
    elif not environment.get("COLORTERM"):
        colours = _colours_in_terminfo(environment)
        if colours == 0:  # such as a vt220
            environment["NO_COLOR"] = "1"
        elif colours is not None and colours >= 256:
            environment.setdefault("TEXTUAL_COLOR_SYSTEM", "256")


def _colours_in_terminfo(environment: MutableMapping[str, str]) -> int | None:
    """The number of colours of TERM in terminfo; None if there is no such entry."""
    import curses  # noqa: PLC0415 - few terminals leave COLORTERM out

    try:
        curses.setupterm(environment.get("TERM", "dumb"), 1)
    except curses.error:
        return None
    return max(0, curses.tigetnum("colors"))
