"""Tones: named styles, resolved against the current theme.

They are not component classes of the style sheet: Textual creates a DOM node for each component
class of each widget, which took half of the time to the first frame.
"""

from dataclasses import dataclass

from rich.style import Style
from textual.color import Color
from textual.widget import Widget


@dataclass(frozen=True)
class Tone:
    """A style. Colours are variables of the theme; empty: those of the widget."""

    colour: str = ""
    background: str = ""
    opacity: float = 1.0
    """Of the background over the widget's own."""
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
    "head": Tone("dim", "bar", style="bold", no_color="reverse"),
    "tab": Tone("dim", "bar", no_color=""),
    "here": Tone("", "focus-bar", style="bold", no_color="reverse"),
    "match": Tone("background", "warn", no_color="reverse"),
    "cursor": Tone("", "chosen", no_color="reverse"),
    "notice": Tone("", "focus-bar", no_color="reverse"),
    **{f"s{i}": Tone(f"s{i}") for i in range(1, 7)},
    "heat1": Tone("", "s6", 0.25),
    "heat2": Tone("", "s6", 0.5, "bold", "underline"),
    "heat3": Tone("", "s6", 0.8, "bold underline", "reverse"),
    "cold1": Tone("", "s1", 0.2),
    "cold2": Tone("", "s1", 0.4, "bold", "underline"),
    "cold3": Tone("", "s1", 0.65, "bold underline", "reverse"),
    # -- words that only one of two responses has
    "mine": Tone("s1", style="bold"),
    "theirs": Tone("s6", style="underline"),
    # -- charts
    "title": Tone("", "bar", no_color="bold"),
    "value": Tone("", "bar", style="bold"),
    "focus": Tone("", "focus-bar", style="bold", no_color="reverse"),
    "raw": Tone("raw"),
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


def style_of(widget: Widget, name: str) -> Style:
    """The style of a tone on a widget."""
    tone, style = TONES[name], widget.rich_style
    variables = widget.app.theme_variables
    if tone.colour:
        style += Style(color=Color.parse(variables[tone.colour]).rich_color)
    if tone.background:
        style += Style(bgcolor=_background(widget, tone).rich_color)
    no_color = widget.app.no_color and tone.no_color is not None
    attributes = tone.no_color if no_color else tone.style
    return style + Style.parse(attributes) if attributes else style


def _background(widget: Widget, tone: Tone) -> Color:
    """The background of a tone, blended over the widget's."""
    colour = Color.parse(widget.app.theme_variables[tone.background])
    if tone.opacity == 1:
        return colour
    return widget.background_colors[1].blend(colour, tone.opacity)
