"""Guard rails on a living run and replayed over one: what they say, do and send."""

import json

import pytest


@pytest.fixture(scope="module")
def guarded(lab, place, wait_until):
    """A run that a rule of its own pauses after step 2, and that meets infinity in step 5.

    Its alerts go to a command that keeps what it is told, and to one line of its environment.
    """
    box = place / "alerts"
    box.mkdir()
    rule = "{name: enough, metric: episode, above: 7, action: pause}"
    run = lab.run(
        "guarded",
        f"guardrails.rules=[{rule}]",
        f'notify.command=cat > {box}/$$.part; echo "$RLHF_TUI_ALERT" > {box}/$$.text; '
        f"mv {box}/$$.part {box}/$$.json",
    )
    # Held in step 3, the pause that step 2 calls for is there before step 3 ends; if the supervisor
    # is quick, even before step 3 begins.
    run.hold(3)
    run.answer_at(5, "1e39")
    run.follower = None
    run.start()
    run.wait_for("pausing", "paused")
    run.release(3)
    run.wait_for("paused")
    run.first_pause = run.step
    run.follower = lab.popen("logs", run.name, "-f")
    assert run.order("unpause")["status"] == "applied"
    run.wait_for("paused")
    run.second_pause = run.step
    run.follows = run.follower.poll() is None
    wait_until(lambda: len(list(box.glob("*.json"))) >= len(run.events("alert")), "messages")
    run.told = [json.loads(f.read_text()) for f in sorted(box.glob("*.json"))]
    run.sentences = [f.read_text() for f in sorted(box.glob("*.text"))]
    run.stopped = run.order("stop")
    run.free = not run.session.is_live()
    run.wait_gone()
    yield run
    if run.follower is not None:
        run.follower.kill()
        run.follower.communicate()
    run.end()


def alert_of(run, rule):
    return next(e for e in run.events("alert") if e["rule"] == rule)


def test_a_rule_pauses_a_living_run_at_the_next_boundary(guarded):
    assert guarded.first_pause in (2, 3)
    pauses = [c["who"] for c in guarded.commands().values() if c["command"] == "pause"]
    assert pauses[0] == "guard rail enough"


def test_the_alert_carries_its_evidence(guarded):
    alert = alert_of(guarded, "enough")
    assert alert["step"] == 2
    assert alert["metric"] == "episode"
    assert alert["value"] == 8
    assert alert["window"] == [4]
    assert alert["action"] == "pause"
    assert alert["text"] == "episode is 8, above 7"
    scores = [s["score"] for s in alert["samples"]]
    assert len(scores) == 4
    assert scores == sorted(scores)
    assert {"prompt", "response", "kl", "length", "index"} <= set(alert["samples"][0])


def test_a_rule_speaks_once_while_its_condition_holds(guarded):
    assert len([e for e in guarded.events("alert") if e["rule"] == "enough"]) == 1


def test_what_is_not_finite_pauses_a_run_that_says_nothing_about_it(guarded):
    alert = alert_of(guarded, "non_finite")
    assert alert["step"] == 5
    assert "objective/scores" in alert["text"]
    assert guarded.second_pause in (5, 6)


def test_infinity_is_null_for_whoever_reads_the_run(guarded):
    row = next(r for r in guarded.lab.json("metrics", guarded.name) if r["step"] == 5)
    assert row["objective/scores"] is None
    samples = guarded.lab.json("samples", guarded.name)
    assert {s["score"] for s in samples if s["step"] == 5} == {None}
    for command in ("status", "events"):
        assert guarded.lab.json(command, guarded.name)
    for command in ("status", "metrics", "samples", "events"):
        assert guarded.lab.cli(command, guarded.name).returncode == 0


def test_the_notify_command_is_given_each_alert_as_json(guarded):
    by_rule = {alert["rule"]: alert for alert in guarded.told}
    assert {"enough", "non_finite"} <= set(by_rule)
    assert by_rule["enough"]["session"] == "guarded"
    assert by_rule["enough"]["step"] == 2
    assert by_rule["enough"]["metric"] == "episode"
    assert any("episode is 8" in text for text in guarded.sentences)


def test_a_paused_run_can_be_stopped_and_is_saved(guarded):
    assert guarded.stopped["status"] == "applied"
    assert guarded.state == "stopped"
    assert guarded.checkpoint(guarded.second_pause)["state"]["step"] == guarded.second_pause


def test_who_waits_for_a_stop_finds_the_engine_gone(guarded):
    assert guarded.free


def test_following_a_log_ends_when_the_engine_does(guarded):
    assert guarded.follows
    guarded.follower.wait(timeout=30)
    assert guarded.follower.returncode == 0


def test_a_dry_run_says_what_the_rules_said(guarded):
    replayed = guarded.lab.json("guardrails", guarded.name, "--dry-run")
    spoken = [(a["rule"], a["step"]) for a in replayed]
    assert ("enough", 2) in spoken
    assert ("non_finite", 5) in spoken
    live = [(e["rule"], e["step"]) for e in guarded.events("alert")]
    assert sorted(spoken) == sorted(live)


def test_a_dry_run_tries_other_rules_on_a_finished_run(whole, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "guardrails:\n  defaults: false\n  rules:\n"
        "    - {name: often, metric: lr, above: 0.0}\n"
        "    - {name: never, metric: lr, above: 1.0}\n"
    )
    replay = ("guardrails", whole.name, "--dry-run", "--rules", rules)
    assert [(a["rule"], a["step"]) for a in whole.lab.json(*replay)] == [("often", 1)]
    assert "step 1  often (notify)" in whole.lab.cli(*replay).stdout


@pytest.mark.parametrize(
    "text", ["- 1\n", "guardrails: [\n", "rules: [{name: a}]\n", "rules: [{name: a, metric: b}]\n"]
)
def test_rules_that_are_none_are_the_users_mistake(whole, tmp_path, text):
    rules = tmp_path / "rules.yaml"
    rules.write_text(text)
    done = whole.lab.cli("guardrails", whole.name, "--dry-run", "--rules", rules)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
