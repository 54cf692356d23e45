"""Guard rails on a running session, and evaluated on its recorded steps."""

import json

import pytest

from tests.waiting import until


@pytest.fixture(scope="module")
def guarded(either_lab, place):
    """A run that its own rule pauses after steps 2 and 4, with infinite scores in step 6.

    Its notify command stores the JSON of each alert, and the text from its environment.
    """
    lab = either_lab
    box = place / f"alerts-{'light' if lab.is_light else 'model'}"
    box.mkdir()
    rule = "{name: enough, metric: episode, above: 7, action: pause}"
    # A function's own score beyond float32 would end the run; ten times this one is infinite.
    mix = "[{model: 'starter:reward'}, {function: 'gate:score', weight: 10}]"
    run = lab.run(
        "guarded",
        f"reward.mix={mix}",
        f"guardrails.rules=[{rule}]",
        f'notify.command=cat > {box}/$$.part; echo "$RLHF_TUI_ALERT" > {box}/$$.text; '
        f"mv {box}/$$.part {box}/$$.json",
    )
    # While step 3 is held, the supervisor requests the pause for step 2, possibly before step 3
    # begins. The same holds for the others.
    run.hold(3, 5, 7)
    run.score_at(6, "1e39" if lab.is_light else "3e38")
    run.follower = None
    run.start()
    run.pauses, run.shown, run.statuses = [], [], []
    for held in (3, 5, 7):
        run.wait_for("pausing", "paused")
        run.release(held)
        run.wait_for("paused")
        run.pauses.append(run.step)
        run.shown.append([lab.cli("status", run.name).stdout, lab.cli("ls").stdout])
        run.statuses.append([lab.json("status", run.name), live_status(run)])
        run.follower = run.follower or lab.popen("logs", run.name, "-f")
        if held != 7:
            assert run.command("unpause")["status"] == "applied"
    run.first_pause, _, run.last_pause = run.pauses
    run.was_following = run.follower.poll() is None
    until(lambda: len(list(box.glob("*.json"))) >= len(run.events("alert")), "messages")
    run.notified = [json.loads(f.read_text()) for f in sorted(box.glob("*.json"))]
    run.sentences = [f.read_text() for f in sorted(box.glob("*.text"))]
    run.stopped = run.command("stop")
    run.engine_gone = not run.session.is_live()
    run.wait_gone()
    run.last_words = [json.loads(f.read_text()) for f in sorted(box.glob("*.json"))]
    run.log_text = run.session.log_file.read_text(errors="replace")
    yield run
    if run.follower is not None:
        run.follower.kill()
        run.follower.communicate()
    run.end()


def live_status(run):
    with run.client() as client:
        return client.status()


def alert_of(run, rule):
    return next(e for e in run.events("alert") if e["rule"] == rule)


def test_a_rule_pauses_a_run_at_the_next_boundary(guarded):
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


def test_a_rule_raises_an_alert_after_unpausing_once_the_metric_is_twice_as_far_beyond(guarded):
    alerts = [e["step"] for e in guarded.events("alert") if e["rule"] == "enough"]
    assert alerts[:2] == [2, 4]
    assert guarded.pauses[1] in (4, 5)


def test_what_paused_the_run_is_shown_while_it_is_paused(guarded):
    reasons = [
        "enough at step 2: episode 8 > 7",
        "enough at step 4: episode 16 > 7",
        "non_finite at step 6: objective/scores",
    ]
    for reason, shown, (listed, live) in zip(reasons, guarded.shown, guarded.statuses, strict=True):
        for output in shown:
            assert f"paused by {reason}" in output
        assert listed["pause_reason"] == live.pause_reason
        assert live.pause_reason.startswith(reason)
    assert guarded.lab.json("status", guarded.name)["pause_reason"] is None


def test_a_non_finite_metric_pauses_a_run_by_default(guarded):
    alert = alert_of(guarded, "non_finite")
    assert alert["step"] == 6
    assert "objective/scores" in alert["text"]
    assert guarded.last_pause in (6, 7)


def test_infinity_is_null_in_json(guarded):
    row = next(r for r in guarded.lab.json("metrics", guarded.name) if r["step"] == 6)
    assert row["objective/scores"] is None
    samples = guarded.lab.json("samples", guarded.name)
    assert {s["score"] for s in samples if s["step"] == 6} == {None}
    for command in ("status", "events"):
        assert guarded.lab.json(command, guarded.name)
    for command in ("status", "metrics", "samples", "events"):
        assert guarded.lab.cli(command, guarded.name).returncode == 0


def test_the_notify_command_is_given_each_alert_as_json(guarded):
    sent = {(alert["rule"], alert["step"]): alert for alert in guarded.notified}
    assert {("enough", 2), ("enough", 4), ("non_finite", 6)} <= set(sent)
    assert sent["enough", 2]["session"] == "guarded"
    assert sent["enough", 2]["metric"] == "episode"
    assert any("episode is 8" in text for text in guarded.sentences)


def test_each_pause_of_a_rule_and_the_end_are_notified_once_and_the_log_says_so(guarded):
    pausing = {(m["kind"], m["level"]) for m in guarded.last_words if m["action"] == "pause"}
    assert pausing == {("alert", "error")}
    rest = [(m["kind"], m["level"]) for m in guarded.last_words if m["kind"] != "alert"]
    assert rest == [("end", "info")]
    assert "notify.command sent: guarded step" in guarded.log_text


def test_a_paused_run_can_be_stopped_and_is_saved(guarded):
    assert guarded.stopped["status"] == "applied"
    assert guarded.state == "stopped"
    assert guarded.checkpoint(guarded.last_pause)["state"]["step"] == guarded.last_pause


def test_stop_with_wait_returns_after_the_engine_has_ended(guarded):
    assert guarded.engine_gone


def test_following_a_log_ends_when_the_engine_does(guarded):
    assert guarded.was_following
    guarded.follower.wait(timeout=240)
    assert guarded.follower.returncode == 0


def test_a_dry_run_repeats_the_alerts_of_the_run(guarded):
    evaluated = guarded.lab.json("guardrails", guarded.name, "--dry-run")
    alerts = [(a["rule"], a["step"]) for a in evaluated]
    assert ("enough", 2) in alerts
    assert ("non_finite", 6) in alerts
    live = [(e["rule"], e["step"]) for e in guarded.events("alert")]
    assert sorted(alerts) == sorted(live)


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


def test_a_file_of_rules_without_their_section_is_told_so(whole, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("model: {policy: x}\n")
    done = whole.lab.cli("guardrails", whole.name, "--rules", rules)
    assert (done.returncode, "has no guardrails section" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "text", ["- 1\n", "guardrails: [\n", "rules: [{name: a}]\n", "rules: [{name: a, metric: b}]\n"]
)
def test_invalid_rules_are_a_user_error(whole, tmp_path, text):
    rules = tmp_path / "rules.yaml"
    rules.write_text(text)
    done = whole.lab.cli("guardrails", whole.name, "--dry-run", "--rules", rules)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
