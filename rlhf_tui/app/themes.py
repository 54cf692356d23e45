"""The themes dark, light and contrast, for terminals of 16 million, 256 and 16 colours.

Their colours come from the Okabe–Ito palette. A terminal with fewer colours gets a palette of the
colours that it has. Textual would otherwise replace each colour by the nearest one, which makes
dark tints equal to the background and the steps of the heat strip equal to one another.
"""

from collections.abc import Callable

from msgspec import Struct
from textual.color import Color
from textual.theme import Theme

ORANGE, SKY, YELLOW = "#E69F00", "#56B4E9", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

Series = tuple[str, str, str, str, str, str]
Step = tuple[str, str]
"""Background and text of one step of a heat strip."""
Ramp = tuple[Step, Step, Step]

_SERIES_DARK: Series = (SKY, ORANGE, "#2FC79A", PURPLE, YELLOW, "#E0733A")
_SERIES_LIGHT: Series = (BLUE, "#B87A00", "#007A59", "#A8477D", "#8A8000", VERMILLION)
MIN_CONTRAST = 3.0
"""Minimum contrast of text (WCAG 2, for large text)."""
MIN_CONTRAST_OF_16 = 4.5
"""That of coloured text on the selected row with 16 colours, of which each terminal shows its own:
bright red on blue, which have 4.4 here, cannot be read in many."""


class Palette(Struct, frozen=True):
    """The colours of a theme, as `#rrggbb`."""

    ground: str
    text: str
    dim: str
    bar: str
    """Background of headings, tabs, buttons and fields."""
    focus: str
    """Background of the focused one of them, and of the crosshair."""
    cursor: str
    """Background of the selected row."""
    band: str
    """Background of the band around the KL target. With 16 colours it is the ground, as none
    of them is a tint: the band has its dotted edges only."""
    raw: str
    """Unsmoothed values behind a curve."""
    series: Series
    good: str
    warn: str
    bad: str
    accent: str
    heat: Ramp
    """Values above the centre of a heat strip, weakest first."""
    cold: Ramp
    """Values below it."""

    @property
    def state(self) -> str:
        """Background of the run's state beside the tabs: the bar, if a state can be read on it.

        None of the 16 colours is a grey for that.
        """
        bar = Color.parse(self.bar)
        tones = (self.good, self.warn, self.bad)
        readable = all(contrast(Color.parse(tone), bar) > MIN_CONTRAST for tone in tones)
        return self.bar if readable else self.ground


def _blended(ground: str, text: str, colour: str) -> Ramp:
    """A ramp from the ground to a colour, each step with the text that is easier to read on it."""

    def step(share: float) -> Step:
        background = Color.parse(ground).blend(Color.parse(colour), share)
        return background.hex6, _more_readable(background, ground, text)

    return step(0.25), step(0.5), step(0.8)


def _more_readable(background: Color, *texts: str) -> str:
    return max(texts, key=lambda text: contrast(background, Color.parse(text)))


def contrast(one: Color, other: Color) -> float:
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2, "relative luminance")."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: Color) -> float:
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour.normalized
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _true_dark() -> Palette:
    ground, text, series = "#11151a", "#d7dde4", _SERIES_DARK
    return Palette(
        ground=ground, text=text, dim="#7f8b98", bar="#1d242d", focus="#2b4258", cursor="#26323f",
        band="#17291f", raw="#3b5a70", series=series, good="#2FC79A", warn=ORANGE, bad="#FF7A4D",
        accent=SKY, heat=_blended(ground, text, series[5]), cold=_blended(ground, text, series[0]),
    )  # fmt: skip


def _true_light() -> Palette:
    ground, text, series = "#fbfaf7", "#22282e", _SERIES_LIGHT
    return Palette(
        ground=ground, text=text, dim="#6d7680", bar="#e9e7e1", focus="#c6dcec", cursor="#dde6ec",
        band="#e2f0e6", raw="#a9c8dc", series=series, good="#007A59", warn="#9A6500",
        bad="#B34700", accent=BLUE,
        heat=_blended(ground, text, series[5]), cold=_blended(ground, text, series[0]),
    )  # fmt: skip


def _true_contrast() -> Palette:
    ground, text = "#000000", "#ffffff"
    series: Series = (SKY, ORANGE, "#00D69B", "#FFA6D2", YELLOW, "#FF7A30")
    return Palette(
        ground=ground, text=text, dim="#b0b0b0", bar="#2a2a2a", focus="#005a8c", cursor="#404040",
        band="#1c3a2c", raw="#5f7f95", series=series, good="#00D69B", warn=YELLOW, bad="#FF7A30",
        accent=SKY, heat=_blended(ground, text, series[5]), cold=_blended(ground, text, series[0]),
    )  # fmt: skip


# Levels of the 6×6×6 cube (00 5f 87 af d7 ff) and greys 08 + 0a × i: numbers 16 to 255 of xterm.
# rich shows the lighter greys one step darker, which is without consequence here.
def _dark_256() -> Palette:
    return Palette(
        ground="#121212", text="#dadada", dim="#8a8a8a", bar="#262626", focus="#005f87",
        cursor="#3a3a3a", band="#303030", raw="#5f87af",
        series=("#5fafff", "#d7af00", "#00d7af", "#d787af", "#ffff5f", "#ff875f"),
        good="#00d7af", warn="#ffaf00", bad="#ff875f", accent="#5fafff",
        heat=(("#5f0000", "#dadada"), ("#af5f00", "#ffffff"), ("#ffaf00", "#121212")),
        cold=(("#000087", "#dadada"), ("#005faf", "#ffffff"), ("#5fafff", "#121212")),
    )  # fmt: skip


def _light_256() -> Palette:
    return Palette(
        ground="#ffffff", text="#262626", dim="#6c6c6c", bar="#dadada", focus="#afd7ff",
        cursor="#d7d7ff", band="#d7ffd7", raw="#87afd7",
        series=("#005faf", "#af5f00", "#00875f", "#af5faf", "#878700", "#d75f00"),
        good="#00875f", warn="#af5f00", bad="#af0000", accent="#005faf",
        heat=(("#ffd7af", "#262626"), ("#ffaf5f", "#262626"), ("#d75f00", "#121212")),
        cold=(("#d7d7ff", "#262626"), ("#87d7ff", "#262626"), ("#005faf", "#ffffff")),
    )  # fmt: skip


def _contrast_256() -> Palette:
    return Palette(
        ground="#000000", text="#ffffff", dim="#bcbcbc", bar="#303030", focus="#005faf",
        cursor="#4e4e4e", band="#3a3a3a", raw="#87afd7",
        series=("#5fd7ff", "#ffaf00", "#00ffaf", "#ffafd7", "#ffff5f", "#ff875f"),
        good="#00ffaf", warn="#ffff5f", bad="#ff875f", accent="#5fd7ff",
        heat=(("#5f0000", "#ffffff"), ("#af5f00", "#ffffff"), ("#ffaf00", "#000000")),
        cold=(("#000087", "#ffffff"), ("#005faf", "#ffffff"), ("#5fd7ff", "#000000")),
    )  # fmt: skip


# The values by which rich knows the 16 colours of a terminal, which shows its own instead.
_BLACK, _RED, _GREEN, _BROWN = "#000000", "#aa0000", "#00aa00", "#aa5500"
_NAVY, _MAGENTA, _CYAN, _SILVER = "#0000aa", "#aa00aa", "#00aaaa", "#aaaaaa"
_GREY, _BRIGHT_RED, _BRIGHT_GREEN, _BRIGHT_YELLOW = "#555555", "#ff5555", "#55ff55", "#ffff55"
_BRIGHT_MAGENTA, _BRIGHT_CYAN, _WHITE = "#ff55ff", "#55ffff", "#ffffff"


def _dark_16() -> Palette:
    # Grey is a background only: some terminals have it equal to black.
    return Palette(
        ground=_BLACK, text=_WHITE, dim=_SILVER, bar=_GREY, focus=_NAVY, cursor=_NAVY,
        band=_BLACK, raw=_CYAN,
        series=(_BRIGHT_CYAN, _BRIGHT_YELLOW, _BRIGHT_GREEN, _BRIGHT_MAGENTA, _WHITE, _BRIGHT_RED),
        good=_BRIGHT_GREEN, warn=_BRIGHT_YELLOW, bad=_BRIGHT_RED, accent=_BRIGHT_CYAN,
        heat=((_BLACK, _BRIGHT_YELLOW), (_BROWN, _BLACK), (_BRIGHT_YELLOW, _BLACK)),
        cold=((_BLACK, _BRIGHT_CYAN), (_NAVY, _WHITE), (_BRIGHT_CYAN, _BLACK)),
    )  # fmt: skip


def _light_16() -> Palette:
    # Brown is yellow in many terminals, which cannot be read on white.
    return Palette(
        ground=_WHITE, text=_BLACK, dim=_GREY, bar=_SILVER, focus=_BRIGHT_CYAN,
        cursor=_BRIGHT_CYAN, band=_WHITE, raw=_CYAN,
        series=(_NAVY, _MAGENTA, _GREEN, _BROWN, _GREY, _RED),
        good=_GREEN, warn=_MAGENTA, bad=_RED, accent=_NAVY,
        heat=((_WHITE, _RED), (_BRIGHT_YELLOW, _BLACK), (_RED, _WHITE)),
        cold=((_WHITE, _NAVY), (_BRIGHT_CYAN, _BLACK), (_NAVY, _WHITE)),
    )  # fmt: skip


PALETTES: dict[str, dict[str, Callable[[], Palette]]] = {
    "truecolor": {"dark": _true_dark, "light": _true_light, "contrast": _true_contrast},
    "256": {"dark": _dark_256, "light": _light_256, "contrast": _contrast_256},
    "standard": {"dark": _dark_16, "light": _light_16, "contrast": _dark_16},
}
"""Palettes by colour system, as :class:`rich.console.Console` names them, and theme."""


def themes_of(color_system: str | None) -> list[Theme]:
    """The themes for a terminal.

    Args:
        color_system: `color_system` of Textual's console, which is what it writes in; others than
            those of :data:`PALETTES` have all colours.
    """
    palettes = PALETTES.get(color_system or "", PALETTES["truecolor"])
    return [
        _theme(
            name,
            palette(),
            dark=name != "light",
            exact=palettes is not PALETTES["truecolor"],
            min_contrast=MIN_CONTRAST_OF_16 if palettes is PALETTES["standard"] else MIN_CONTRAST,
        )
        for name, palette in palettes.items()
    ]


def _theme(name: str, p: Palette, *, dark: bool, exact: bool, min_contrast: float) -> Theme:
    variables = {f"s{i}": colour for i, colour in enumerate(p.series, start=1)}
    for ramp, steps in (("heat", p.heat), ("cold", p.cold)):
        for i, (background, text) in enumerate(steps, start=1):
            variables |= {f"{ramp}{i}": background, f"on-{ramp}{i}": text}
    variables |= {
        "dim": p.dim, "bar": p.bar, "state": p.state, "focus-bar": p.focus, "chosen": p.cursor,
        "band": p.band, "raw": p.raw, "good": p.good, "warn": p.warn, "bad": p.bad, "key": p.accent,
    }  # fmt: skip
    # Of the text on the selected row, what cannot be read there has the row's own text colour.
    for key in ("dim", "good", "warn", "bad", "key", "raw", *(f"s{i}" for i in range(1, 7))):
        readable = contrast(Color.parse(variables[key]), Color.parse(p.cursor)) > min_contrast
        variables[f"chosen-{key}"] = variables[key] if readable else p.text
    if exact:
        # Textual derives these by blending, to colours that the terminal does not have.
        variables |= {
            "scrollbar": p.dim, "scrollbar-hover": p.accent, "scrollbar-active": p.accent,
            "scrollbar-background": p.bar, "scrollbar-background-hover": p.bar,
            "scrollbar-background-active": p.bar, "scrollbar-corner-color": p.bar,
            "input-cursor-background": p.text, "input-cursor-foreground": p.ground,
            "input-selection-background": p.focus, "block-cursor-background": p.focus,
            "block-cursor-foreground": p.text, "block-hover-background": p.cursor,
            "text-muted": p.dim, "text-disabled": p.dim,
        }  # fmt: skip
    return Theme(
        name=name, primary=p.accent, secondary=p.series[1], accent=p.accent, warning=p.warn,
        error=p.bad, success=p.good, foreground=p.text, background=p.ground, surface=p.ground,
        panel=p.bar, dark=dark, variables=variables,
    )  # fmt: skip
