"""A run with held-out evaluations, and the evaluation of its checkpoints by the command line."""

import json

import pytest

from tests.waiting import until

EVALUATED = ("eval.every=4", "eval.holdout=4", "eval.per_prompt=2", "train.best_metric=eval/score")


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_to_the_numbers_of_its_step(lab):
    run = lab.run("evaluated", *EVALUATED, steps=4)
    run.start()
    run.finish()
    with run.reader() as reader:
        names = [n for n in reader.metrics.names() if n.startswith("eval/")]
        curves = {name: dict(reader.metrics.series(name)) for name in names}
        kept = [s.as_json() for s in reader.samples.evaluated(4)]
    assert all(set(curve) == {0, 4} for curve in curves.values())
    again = lab.json("eval", run.name, "--step", 4)
    assert {n: again["metrics"][n] for n in names} == {n: curves[n][4] for n in names}
    assert [s["response"] for s in again["samples"]] == [s["response"] for s in kept]
    assert [s["score"] for s in again["samples"]] == [s["score"] for s in kept]
    assert len(kept) == 8
    assert [s["step"] for s in lab.json("samples", run.name, "--eval")] == [0] * 8 + [4] * 8
    assert "held-out score" in lab.cli("metrics", run.name).stdout


LATE = """
from pathlib import Path

def score(prompts, trainer_state, **_):
    held_out = "The sound" in prompts
    if held_out and trainer_state.global_step == 2 and not Path(__file__).with_name("up").exists():
        raise ValueError("no scores for these")
    return [1.0] * len(prompts)
"""


@pytest.mark.parametrize("ranks", ["stay", "restart"])
def test_an_evaluation_without_scores_is_made_up_for_when_the_run_continues(lab, tmp_path, ranks):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"prompt": "The sound"}\n')
    keys = (f"eval.prompts={held_out}", "eval.every=1", "reward.retries=0", "reward.mix=[]",
            "reward.function=late:score", "kl.reference_update={every: 1, mix: 1.0}",
            "train.save_every=1", "train.keep_last=3")  # fmt: skip
    run = lab.run(f"late-{ranks}", *keys, steps=3)
    (run.gate / "late.py").write_text(LATE)
    run.start()
    run.wait_for("paused")
    with run.reader() as reader:
        assert [step for step, _ in reader.metrics.series("eval/kl")] == [0, 1]
    assert run.step == 2
    run.wait_saved(2)
    if ranks == "restart":
        run.rank().kill()
        until(lambda: len(run.events("ready")) == 2 and run.state == "paused", "another pause")
    (run.gate / "up").touch()
    assert run.command("unpause")["status"] == "applied"
    run.finish()
    with run.reader() as reader:
        curve = dict(reader.metrics.series("eval/kl"))
        responses = reader.samples.evaluated(2)
    assert list(curve) == [0, 1, 2, 3]
    assert curve[2] != 0, "it was measured before the reference became the policy"
    assert [r.prompt for r in responses] == ["The sound"]


WATCHED = """
from pathlib import Path

def watch(prompts, trainer_state, **_):
    if trainer_state.global_step == 2 and not Path(__file__).with_name("up").exists():
        raise ValueError("no scores for these")
    return [float(trainer_state.global_step)] * len(prompts)
"""


@pytest.mark.slow
def test_after_ranks_restart_a_watched_source_is_made_up_for_and_its_checkpoint_kept(lab):
    keys = ("eval.holdout=4", "eval.every=2", "reward.retries=0",
            "eval.rewards=[{function: 'watched:watch', name: judge}]",
            "train.best_metric=eval/reward/judge",
            "train.save_every=2", "train.keep_last=1", "train.keep_best=1")  # fmt: skip
    run = lab.run("watched", *keys, steps=6)
    # Later checkpoints are worse: the one whose evaluation was made up for must be kept.
    (run.gate / "watched.py").write_text(WATCHED.replace("float(", "-float("))
    run.start()
    run.wait_for("paused")
    run.wait_saved(2)
    run.rank().kill()
    until(lambda: len(run.events("ready")) == 2 and run.state == "paused", "another pause")
    (run.gate / "up").touch()
    assert run.command("unpause")["status"] == "applied"
    run.finish()
    with run.reader() as reader:
        assert dict(reader.metrics.series("eval/reward/judge")) == {
            0: 0.0,
            2: -2.0,
            4: -4.0,
            6: -6.0,
        }
        assert [c.step for c in reader.checkpoints()] == [2, 6]


def test_an_evaluation_whose_judge_is_down_says_that_it_waits_and_keeps_the_rest(old, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"prompt": "The lamp"}\n{"prompt": "A night"}\n')
    judges = "eval.rewards=[{service: 'http://127.0.0.1:9/', name: far}]"
    given = (f"eval.prompts={held_out}", judges, "reward.retries=1")
    done = old.cli("eval", "finished", *(word for o in given for word in ("-o", o)), "--json")
    metrics = json.loads(done.stdout)["metrics"]
    assert {"eval/score", "eval/kl"} < metrics.keys()
    assert "eval/reward/far" not in metrics
    waits, ends = done.stderr.strip().splitlines()
    assert waits.startswith("reward 'far' at step 6: http://127.0.0.1:9/: Connection refused")
    assert waits.endswith("it is called again in 1 s")
    assert ends.endswith("evaluated without 'far': evaluate again once it works")
    assert done.returncode == 1
