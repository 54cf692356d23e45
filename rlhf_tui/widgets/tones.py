"""How each tone looks in the present theme.

Not component classes of the style sheet: each of these costs a node of its own for each widget, and
with thirty tones on a dozen widgets they took half of the time to the first picture.
"""

from dataclasses import dataclass

from rich.style import Style
from textual.color import Color
from textual.widget import Widget


@dataclass(frozen=True)
class Tone:
    """Colours are names of the theme's variables; empty ones are the widget's own."""

    colour: str = ""
    ground: str = ""
    share: float = 1.0
    """How much of the ground's colour lies over the widget's own."""
    style: str = ""
    """bold, underline, reverse."""
    plain: str | None = None
    """The style where no colours are to be sent, if it differs."""


TONES = {
    "": Tone(),
    "dim": Tone("dim"),
    "strong": Tone(style="bold"),
    "good": Tone("good"),
    "warn": Tone("warn"),
    "bad": Tone("bad", style="bold"),
    "accent": Tone("primary"),
    "key": Tone("key", style="bold"),
    "head": Tone("dim", "bar", style="bold", plain="reverse"),
    "tab": Tone("dim", "bar", plain=""),
    "here": Tone("", "focus-bar", style="bold", plain="reverse"),
    "match": Tone("background", "warn", plain="reverse"),
    "cursor": Tone("", "chosen", plain="reverse"),
    "notice": Tone("", "focus-bar", plain="reverse"),
    **{f"s{i}": Tone(f"s{i}") for i in range(1, 7)},
    "heat1": Tone("", "s6", 0.25),
    "heat2": Tone("", "s6", 0.5, "bold", "underline"),
    "heat3": Tone("", "s6", 0.8, "bold underline", "reverse"),
    "cold1": Tone("", "s1", 0.2),
    "cold2": Tone("", "s1", 0.4, "bold", "underline"),
    "cold3": Tone("", "s1", 0.65, "bold underline", "reverse"),
    # -- words that only one of two answers has
    "mine": Tone("s1", style="bold"),
    "theirs": Tone("s6", style="underline"),
    # -- charts
    "title": Tone("", "bar", plain="bold"),
    "value": Tone("", "bar", style="bold"),
    "focus": Tone("", "focus-bar", style="bold", plain="reverse"),
    "raw": Tone("raw"),
    "past": Tone("dim"),
    "target": Tone("good"),
    "rule": Tone("warn", style="bold"),
    "command": Tone("primary", style="bold"),
    "checkpoint": Tone("good"),
    "attempt": Tone("dim", style="bold"),
    "alert": Tone("warn", style="bold reverse"),
    "note": Tone("key"),
    "band": Tone("", "band"),
    "crosshair": Tone("", "focus-bar", style="bold"),
}


def style_of(widget: Widget, name: str) -> Style:
    """A tone as it looks on a widget."""
    tone, own = TONES[name], widget.rich_style
    variables = widget.app.theme_variables
    style = own
    if tone.colour:
        style += Style(color=Color.parse(variables[tone.colour]).rich_color)
    if tone.ground:
        style += Style(bgcolor=ground_of(widget, tone).rich_color)
    words = tone.plain if widget.app.no_color and tone.plain is not None else tone.style
    return style + Style.parse(words) if words else style


def ground_of(widget: Widget, tone: Tone) -> Color:
    """The colour behind a tone."""
    over = Color.parse(widget.app.theme_variables[tone.ground])
    return widget.background_colors[1].blend(over, tone.share) if tone.share < 1 else over
