"""The themes: dark, light and high contrast. Their colours come from the Okabe–Ito palette."""

from textual.theme import Theme

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

_SERIES_DARK = (SKY, ORANGE, "#2FC79A", PURPLE, YELLOW, "#E0733A")
_SERIES_LIGHT = (BLUE, "#B87A00", "#007A59", "#A8477D", "#8A8000", VERMILLION)


def _theme(
    name: str, *, dark: bool, ground: str, text: str, dim: str, bar: str, focus: str, cursor: str,
    band: str, raw: str, series: tuple[str, ...], good: str, warn: str, bad: str, accent: str,
) -> Theme:  # fmt: skip
    variables = {f"s{i}": colour for i, colour in enumerate(series, start=1)}
    variables |= {
        "dim": dim, "bar": bar, "focus-bar": focus, "chosen": cursor, "band": band, "raw": raw,
        "good": good, "warn": warn, "bad": bad, "key": accent,
    }  # fmt: skip
    return Theme(
        name=name, primary=accent, secondary=series[1], accent=accent, warning=warn, error=bad,
        success=good, foreground=text, background=ground, surface=ground, panel=bar, dark=dark,
        variables=variables,
    )  # fmt: skip


THEMES = (
    _theme(
        "dark", dark=True, ground="#11151a", text="#d7dde4", dim="#7f8b98", bar="#1d242d",
        focus="#2b4258", cursor="#26323f", band="#17291f", raw="#3b5a70", series=_SERIES_DARK,
        good="#2FC79A", warn=ORANGE, bad="#FF7A4D", accent=SKY,
    ),
    _theme(
        "light", dark=False, ground="#fbfaf7", text="#22282e", dim="#6d7680", bar="#e9e7e1",
        focus="#c6dcec", cursor="#dde6ec", band="#e2f0e6", raw="#a9c8dc", series=_SERIES_LIGHT,
        good="#007A59", warn="#9A6500", bad="#B34700", accent=BLUE,
    ),
    _theme(
        "contrast", dark=True, ground="#000000", text="#ffffff", dim="#b0b0b0", bar="#2a2a2a",
        focus="#005a8c", cursor="#404040", band="#1c3a2c", raw="#5f7f95",
        series=(SKY, ORANGE, "#00D69B", "#FFA6D2", YELLOW, "#FF7A30"),
        good="#00D69B", warn=YELLOW, bad="#FF7A30", accent=SKY,
    ),
)  # fmt: skip
