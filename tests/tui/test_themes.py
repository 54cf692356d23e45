"""The palettes for terminals of few colours, as rich converts them."""

import itertools
import subprocess
import sys

import pytest
from rich.color import Color as RichColor
from rich.color import ColorSystem
from textual.color import Color

from engine.errors import UserInputError
from rlhf_tui.app.themes import MIN_CONTRAST, PALETTES, contrast, themes_of
from rlhf_tui.state.preferences import THEME_NAMES
from rlhf_tui.terminal_colors import VARIABLE, choose
from rlhf_tui.widgets.lines import SELECTED_PREFIX, Lines
from rlhf_tui.widgets.samples.heat import COLD, HEAT
from rlhf_tui.widgets.tones import TONES

TARGETS = {"truecolor": ColorSystem.TRUECOLOR, "256": ColorSystem.EIGHT_BIT,
           "standard": ColorSystem.STANDARD}  # fmt: skip
ALL = [(system, theme) for system in PALETTES for theme in THEME_NAMES]
every_palette = pytest.mark.parametrize(("system", "theme"), ALL)


def shown(palette, system, colour):
    """The colour's number in the terminal, or its triplet."""
    converted = RichColor.parse(colour).downgrade(TARGETS[system])
    return converted.number if converted.triplet is None else converted.triplet


def test_each_colour_system_has_all_themes():
    assert all(set(palettes) == set(THEME_NAMES) for palettes in PALETTES.values())


@every_palette
def test_what_must_differ_differs_in_the_terminal(system, theme):
    palette = PALETTES[system][theme]()

    def of(*colours):
        return [shown(palette, system, colour) for colour in colours]

    # None of the 16 colours is a tint on which a curve can be read: there the band has none.
    tint = () if system == "standard" else (palette.band,)
    for group in (
        of(palette.ground, palette.bar, palette.focus),
        of(palette.ground, palette.cursor),
        of(palette.ground, palette.raw, palette.series[0], *tint),
        of(palette.ground, *palette.series),
        of(palette.good, palette.warn, palette.bad, palette.ground),
    ):
        assert len(set(group)) == len(group)
    steps = [tuple(of(*step)) for step in (*palette.heat, *palette.cold)]
    assert len({*steps, tuple(of(palette.ground, palette.text))}) == len(steps) + 1


@every_palette
def test_text_can_be_read_on_its_background(system, theme):
    palette = PALETTES[system][theme]()
    pairs = [
        *itertools.product((palette.ground, palette.focus, palette.cursor), (palette.text,)),
        *palette.heat,
        *palette.cold,
        *((palette.ground, c) for c in (palette.good, palette.warn, palette.bad, palette.dim)),
        *((palette.state, c) for c in (palette.good, palette.warn, palette.bad, palette.text)),
    ]
    ratios = [contrast(Color.parse(a), Color.parse(b)) for a, b in pairs]
    assert min(ratios) > MIN_CONTRAST  # most are far above


@every_palette
def test_every_text_can_be_read_on_the_selected_row(system, theme):
    variables = next(t for t in themes_of(system) if t.name == theme).variables
    shown = [Color.parse(v) for name, v in variables.items() if name.startswith("chosen-")]
    assert min(contrast(c, Color.parse(variables["chosen"])) for c in shown) > MIN_CONTRAST


@pytest.mark.parametrize("theme", ["dark", "contrast"])
def test_with_16_colours_no_red_text_stands_on_the_blue_of_the_selected_row(theme):
    variables = next(t for t in themes_of("standard") if t.name == theme).variables
    assert variables["chosen-bad"] == PALETTES["standard"][theme]().text
    assert variables["chosen-good"] == variables["good"]


async def test_a_colour_that_cannot_be_read_on_the_selected_row_is_not_used_there(
    make_app, running, monkeypatch
):
    monkeypatch.delenv("COLORTERM", raising=False)
    monkeypatch.setenv("TERM", "xterm-16color")
    app = make_app()
    app.theme = "light"
    async with running(app):
        table = app.screen.query(Lines).first()
        plain, good = table.tone(SELECTED_PREFIX), table.tone(f"{SELECTED_PREFIX}good")
        assert good.color == plain.color != table.tone("good").color
        assert table.tone(f"{SELECTED_PREFIX}bad").color == table.tone("bad").color


@pytest.mark.parametrize("theme", THEME_NAMES)
@pytest.mark.parametrize("term", ["xterm-256color", "xterm-16color"])
async def test_a_match_on_the_selected_row_is_marked_as_on_any_other(
    make_app, running, monkeypatch, term, theme
):
    monkeypatch.delenv("COLORTERM", raising=False)
    monkeypatch.setenv("TERM", term)
    app = make_app()
    app.theme = theme
    async with running(app):
        table = app.screen.query(Lines).first()
        assert table.tone(f"{SELECTED_PREFIX}match") == table.tone("match")
        assert table.tone(SELECTED_PREFIX).bgcolor != table.tone("match").bgcolor


async def test_without_colours_a_match_stands_out_from_the_selected_row(
    make_app, running, monkeypatch
):
    monkeypatch.setenv("NO_COLOR", "1")
    app = make_app()
    async with running(app):
        table = app.screen.query(Lines).first()
        assert table.tone(SELECTED_PREFIX).reverse
        assert not table.tone(f"{SELECTED_PREFIX}match").reverse


def test_a_terminal_s_palette_is_its_own(make_app, monkeypatch):
    monkeypatch.delenv("COLORTERM", raising=False)
    grounds = []
    for term in ("xterm-256color", "xterm-16color", "linux"):
        monkeypatch.setenv("TERM", term)
        grounds.append(make_app().current_theme.variables["bar"])
    assert grounds == ["#262626", "#555555", "#555555"]


def test_strong_values_above_and_below_the_centre_differ_without_colour():
    tones = [TONES[name] for name in (*HEAT[2:], *COLD[2:])]
    looks = {tone.style if tone.no_color is None else tone.no_color for tone in tones}
    assert len(looks) == len(tones)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, {}),
        ({"TERM": "linux", VARIABLE: "256"}, {"TEXTUAL_COLOR_SYSTEM": "256"}),
        ({"TERM": "xterm-256color", VARIABLE: "16"}, {"TEXTUAL_COLOR_SYSTEM": "standard"}),
        ({"TERM": "linux", VARIABLE: "none"}, {"NO_COLOR": "1"}),
    ],
)
def test_the_terminal_s_colours_are_as_chosen(given, expected):
    environment = dict(given)
    choose(environment)
    assert environment == given | expected


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("xterm-256color", "256 None"), ("linux", "None None"), ("vt100", "None 1"),
        ("no-such-one", "None None"),
    ],
)  # fmt: skip
def test_without_a_choice_the_colours_are_those_of_terminfo(term, expected):
    # curses reads terminfo once a process.
    code = "from rlhf_tui.terminal_colors import choose; environment = {'TERM': '%s'}; "
    code += "choose(environment); "
    code += "print(environment.get('TEXTUAL_COLOR_SYSTEM'), environment.get('NO_COLOR'))"
    done = subprocess.run(
        [sys.executable, "-c", code % term], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_a_choice_that_there_is_not_names_those_there_are():
    with pytest.raises(UserInputError, match="must be one of auto, truecolor, 256, 16, none"):
        choose({VARIABLE: "many"})
