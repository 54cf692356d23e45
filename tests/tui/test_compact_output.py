"""The shortened output leads a terminal to the same cells."""

import random

import pytest

from rlhf_tui.app.compact_output import change, compact
from scripts.pictures.cells import cells_of

STYLES = (
    "38;2;1;2;3;48;2;4;5;6", "1;38;2;1;2;3;48;2;4;5;6", "48;2;4;5;6", "38;5;7;48;5;17", "4;31;100",
    "7", "1;2;3;97", "38;2;1;2;3;48;2;9;9;9", "1;38;2;5;5;5",
)  # fmt: skip


def test_random_segments_give_the_same_cells():
    rng = random.Random(3)  # noqa: S311 - no secret
    for _ in range(200):
        data = "".join(
            rng.choice([f"\x1b[{rng.choice(STYLES)}mab \x1b[0m", "plain", "\n", "\x1b[0m"])
            for _ in range(30)
        )
        assert cells_of(compact(data)) == cells_of(data)
        assert len(compact(data)) <= len(data)


@pytest.mark.parametrize(
    "data",
    ["", "text", "\x1b[2;3H\x1b[?25l", "\x1b[31mopen", "\x1b]8;id=1;http://x\x1b\\\x1b[1mx\x1b[0m"],
)
def test_other_output_stays_as_it_is(data):
    assert compact(data) == data


def test_only_what_differs_is_sent():
    assert change("38;2;1;2;3;48;2;4;5;6", "38;2;7;8;9;48;2;4;5;6") == "\x1b[38;2;7;8;9m"
    assert change("31;44", "31;44") == ""
    assert change("1;31;44", "31;44") == "\x1b[0;31;44m"


def test_a_style_is_kept_while_the_cursor_moves_and_no_longer():
    moved, printed = (
        "\x1b[31ma\x1b[0m\x1b[5;1H\x1b[31mb\x1b[0m",
        "\x1b[31ma\x1b[0m\r\n\x1b[31mb\x1b[0m",
    )
    assert compact(moved) == "\x1b[31ma\x1b[5;1Hb\x1b[0m"
    assert compact(printed) == printed
