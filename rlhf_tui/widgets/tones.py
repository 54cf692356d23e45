"""Tones: named styles, resolved against the current theme.

They are not component classes of the style sheet: Textual creates a DOM node for each component
class of each widget, which took half of the time to the first frame.
"""

from msgspec import Struct
from rich.style import Style
from textual.color import Color
from textual.widget import Widget


class Tone(Struct, frozen=True):
    """A style. Colours are variables of the theme; empty: those of the widget."""

    colour: str = ""
    background: str = ""
    style: str = ""
    """Any of bold, underline and reverse."""
    no_color: str | None = None
    """The style under NO_COLOR, if it differs."""


TONES = {
    "": Tone(),
    "dim": Tone("dim"),
    "strong": Tone(style="bold"),
    "good": Tone("good"),
    "warn": Tone("warn"),
    "bad": Tone("bad", style="bold"),
    "accent": Tone("primary"),
    "key": Tone("key", style="bold"),
    "head": Tone("dim", "bar", style="bold", no_color="bold underline"),
    "tab": Tone("dim", "bar", no_color=""),
    "here": Tone("", "focus-bar", style="bold", no_color="reverse"),
    "match": Tone("background", "warn", no_color="reverse"),
    "notice": Tone("", "focus-bar", no_color="reverse"),
    **{f"s{i}": Tone(f"s{i}") for i in range(1, 7)},
    # -- heat strips: with and without colours, bold is above the centre and underlined below it
    "heat1": Tone("on-heat1", "heat1"),
    "heat2": Tone("on-heat2", "heat2", style="bold"),
    "heat3": Tone("on-heat3", "heat3", style="bold", no_color="bold reverse"),
    "cold1": Tone("on-cold1", "cold1"),
    "cold2": Tone("on-cold2", "cold2", style="underline"),
    "cold3": Tone("on-cold3", "cold3", style="underline", no_color="underline reverse"),
    # the bars beside the largest values
    "above": Tone("heat3"),
    "below": Tone("cold3"),
    # -- words that only one of two responses has
    "mine": Tone("s1", style="bold"),
    "theirs": Tone("s6", style="underline"),
    # -- charts
    "title": Tone("", "bar", no_color="bold"),
    "value": Tone("", "bar", style="bold"),
    "focus": Tone("", "focus-bar", style="bold", no_color="reverse"),
    "raw": Tone("raw", no_color="dim"),
    "past": Tone("dim"),
    "target": Tone("good"),
    "rule": Tone("warn", style="bold"),
    "command": Tone("primary", style="bold"),
    "checkpoint": Tone("good"),
    "attempt": Tone("dim", style="bold"),
    "alert": Tone("warn", style="bold reverse"),
    "note": Tone("key"),
    "crash": Tone("bad", style="bold reverse"),
    "band": Tone("", "band"),
    "crosshair": Tone("", "focus-bar", style="bold"),
}


def style_of(widget: Widget, name: str, *, chosen: bool = False) -> Style:
    """The style of a tone on a widget.

    Args:
        widget: where it is shown.
        name: a key of :data:`TONES`.
        chosen: whether it is on the selected line. Text has the line's background there, and the
            line's text colour if its own cannot be read on that; a tone with a background keeps it.
    """
    tone, style = TONES[name], widget.rich_style
    variables = widget.app.theme_variables
    if tone.colour:
        on_chosen = f"chosen-{tone.colour}"
        plain = chosen and not tone.background and on_chosen in variables
        colour = variables[on_chosen if plain else tone.colour]
        style += Style(color=Color.parse(colour).rich_color)
    if background := tone.background or ("chosen" if chosen else ""):
        style += Style(bgcolor=Color.parse(variables[background]).rich_color)
    no_color = widget.app.no_color
    attributes = tone.no_color if no_color and tone.no_color is not None else tone.style
    if attributes:
        style += Style.parse(attributes)
    if chosen and no_color:  # the line is reversed, so what is reversed by itself must not be
        style += Style(reverse=not style.reverse)
    return style
