"""The short form of the fault program (`make test-faults`): some kills and some damage."""

import random

import pytest

from engine.journal.reader import JournalReader
from engine.protocol.commands import Checkpoint, Pause, Rollback, SetBeta
from tests.faults.corruption import corrupt_everything
from tests.faults.lab import WAIT, FaultRun
from tests.faults.light import ENVIRONMENT, LightKills
from tests.faults.points import LIGHT_POINTS, Point
from tests.faults.table import Table
from tests.waiting import until

DAMAGES = 80
"""Do every so manieth of the damages."""
OFTEN_SAVED = ("train.save_every=3", "train.keep_last=1000")


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


def test_damage_at_the_boundaries_of_files_is_an_error_of_one_line_and_found(table, tmp_path):
    corrupt_everything(tmp_path, table, DAMAGES, first=17)
    assert sum(row["tried"] for row in table.rows.values()) > 12


@pytest.mark.parametrize("point", ["begin_attempt|before|2", "_move_samples|before|2"])
def test_a_roll_back_that_was_applied_when_the_engine_was_killed_is_carried_out(tmp_path, point):
    run = FaultRun(tmp_path, "rolled-back", *OFTEN_SAVED, steps=400)
    try:
        run.start(killed_at(run, point))
        run.wait_for_step(8)
        assert run.send(Rollback(step=3)) == "applied"
        until(run.is_over, "the kill", WAIT)
        run.check()
        run.start(ENVIRONMENT)
        until(lambda: attempts_with_steps(run) > 1, "a step after the roll back", WAIT)
        run.kill_engine()
        run.check()
        with JournalReader(run.session) as reader:
            attempts = reader.attempts()
            responses = [len(reader.samples.of_step(step)) for step in range(1, run.step() + 1)]
        assert [a.from_step for a in attempts][1:] == [3] * (len(attempts) - 1)
        assert attempts[1].fresh
        assert all(responses)
    finally:
        run.end()


def test_steps_keep_their_responses_if_the_engine_is_killed_when_it_abandons_them(tmp_path):
    run = FaultRun(tmp_path, "abandoned", *OFTEN_SAVED, steps=400)
    try:
        run.start(ENVIRONMENT)
        run.wait_for_step(8)
        run.kill_engine()
        run.start(killed_at(run, "_supersede|before|1"), from_step=3)
        until(run.is_over, "the kill", WAIT)
        run.start(ENVIRONMENT)
        until(lambda: attempts_with_steps(run) > 1, "a step after the resume", WAIT)
        run.kill_engine()
        with JournalReader(run.session) as reader:
            responses = [len(reader.samples.of_step(step)) for step in range(1, run.step() + 1)]
        assert all(responses)
    finally:
        run.end()


def attempts_with_steps(run: FaultRun) -> int:
    """How many attempts of a run have recorded a step, or precede one that has."""
    with JournalReader(run.session) as reader:
        return sum(reader.has_steps(a.attempt) for a in reader.attempts())


def killed_at(run: FaultRun, point: str) -> dict[str, str]:
    """The environment of an engine that is killed at a call of its JournalWriter."""
    marker = run.place / "marker"
    value = f"engine.journal.writer:JournalWriter.{point}|kill|{marker}"
    return ENVIRONMENT | {"RLHF_TUI_TEST_POINT": value}


def test_a_roll_back_to_a_checkpoint_saved_after_a_change_is_killed_and_the_history_fits(tmp_path):
    run = FaultRun(tmp_path, "rolled-back", "train.save_every=1000", steps=400)
    marker = run.place / "marker"
    roll_back = Point("", "engine.journal.writer:JournalWriter.begin_attempt", "after", 2)
    try:
        run.start(ENVIRONMENT | {"RLHF_TUI_TEST_POINT": roll_back.text(str(marker))})
        run.wait_for_step(1)
        for command in (Pause(), SetBeta(value=0.808), Checkpoint()):
            assert run.send(command, WAIT) == "applied"
        run.send(Rollback(step=run.step()))
        until(marker.exists, "the attempt of the roll back", WAIT)
        run.kill_engine()
        run.check()
    finally:
        run.end()
