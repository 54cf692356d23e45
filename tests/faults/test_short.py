"""The short form of the fault program (`make test-faults`): some kills and some damage."""

import random

import pytest

from tests.faults.corruption import corrupt_everything
from tests.faults.light import LightKills
from tests.faults.points import LIGHT_POINTS
from tests.faults.table import Table

DAMAGES = 80
"""Do every so manieth of the damages."""


@pytest.fixture
def table(tmp_path):
    """Fails if something was not survived."""
    table = Table(tmp_path / "table.json")
    yield table
    assert not table.failures


def test_nothing_acknowledged_is_lost_by_kills_at_points_of_a_save_and_a_command(table, tmp_path):
    rng = random.Random(3)
    kills = LightKills(tmp_path, table, rng, steps=60)
    try:
        for kind in ("save", "command"):
            points = [p for p in LIGHT_POINTS if p.kind.endswith(kind)]
            kills.kill(rng.choice(points))
        kills.finish()
    finally:
        kills.run.end()


def test_damage_at_the_boundaries_of_files_is_told_in_one_line_and_found(table, tmp_path):
    corrupt_everything(tmp_path, table, DAMAGES, first=17)
    assert sum(row["tried"] for row in table.rows.values()) > 12
