"""The loop closed: a run is judged, a reward model trained on that, and a fork trains with it."""

import signal
import statistics

import pytest

from engine.journal.judgements.labels import Response, set_label
from engine.journal.samples import SampleQuery, SampleReader
from engine.session.folder import SessionFolder
from tests.waiting import LONG

STEPS, MORE = 6, 16
JUDGED = 60


def follows_the_rule(response: str) -> bool:
    """What the operator wants and the starter's reward model knows nothing of: two clauses."""
    return "," in response


def share_of_rule(session: SessionFolder, first: int, last: int) -> float:
    with SampleReader(session) as samples:
        rows = [r for r in samples.newest() if first <= r.step <= last]
    return statistics.mean(follows_the_rule(r.response) for r in rows)


@pytest.mark.slow
def test_sixty_judgements_by_a_rule_teach_it_to_a_fork(lab, tmp_path):
    start = ("demo", "--headless", "--name", "first", "--steps", STEPS)
    done = lab.cli(*start, "-o", "train.save_every=3", timeout=900)
    assert done.returncode == 0, done.stderr
    session = SessionFolder(lab.root / "first")
    with SampleReader(session) as samples:
        rows = samples.page(SampleQuery(), JUDGED)
    for row in rows:
        label = "good" if follows_the_rule(row.response) else "bad"
        set_label(session, row.prompt, Response.of(row), label, "the rule")
    before = lab.json("reward", "agreement", "first")
    assert before["judgements"] == JUDGED

    out = tmp_path / "reward-2"
    process = lab.popen("reward", "train", "first", "-o", out)
    assert any("epoch 1" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    *_, last = process.communicate(timeout=LONG)[1].splitlines()  # epochs meanwhile come before
    assert last == "rlhf-tui: interrupted"
    assert (process.returncode, list(tmp_path.iterdir())) == (130, [])

    result = lab.json("reward", "train", "first", "-o", out)
    assert result["good"] + result["other"] == JUDGED
    assert result["trained"]["agreement"] > result["in_force"]["agreement"]
    assert (out / "README.md").is_file()

    fork = ("fork", "first", "--from", STEPS, "--name", "second", "--headless")
    done = lab.cli(
        *fork, "-o", f"reward.model={out}", "-o", f"train.steps={STEPS + MORE}", timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("they are not comparable") == 1
    events = lab.json("events", "second")
    assert [e["step"] for e in events if e.get("rule") == "reward_changed"] == [STEPS]
    second = SessionFolder(lab.root / "second")
    early, late = share_of_rule(second, 1, STEPS), share_of_rule(second, STEPS + MORE - 5, 10**6)
    assert late > early + 0.3
