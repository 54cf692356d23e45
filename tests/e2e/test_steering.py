"""Commands: when they are applied, how they are reported, and that a pause changes no numbers."""

import json
import os
import signal
from types import SimpleNamespace

import psutil
import pytest

from tests.waiting import until


@pytest.fixture(scope="module")
def held(lab):
    """A run that is paused after step 3, gets commands that are undone again, and finishes.

    In step 6 it is rolled back to the checkpoint that it saved during the pause. Its numbers must
    equal those of the uninterrupted run. `seen` holds the observations.
    """
    run = lab.run("held")
    seen = run.seen = SimpleNamespace()
    run.hold(3)
    run.start()
    run.wait_at(3)
    seen.status_at_3 = run.lab.json("status", run.name)
    with run.client() as client:
        seen.boundary_in = client.status().boundary_in
    seen.undo_nothing = run.ctl("undo")
    seen.timed_out = run.ctl("set", "save_every=4", "--id", "late", "--wait", "--timeout", "0.2")
    seen.accepted = run.ctl("pause", "--id", "hold-it")
    seen.pausing = run.state
    run.release(3)
    run.wait_for("paused")
    seen.paused_at = run.step
    seen.pause_again = run.ctl("pause")

    # All of these are applied during the pause, without completing a step.
    seen.checkpoint = run.command("checkpoint")
    seen.probe = run.command("probe", "The film was")
    seen.beta = run.command("beta", "0.7", "--id", "once")
    seen.beta_again = run.command("beta", "0.7", "--id", "once")
    seen.undo = run.command("undo")
    seen.too_long = run.command("set", "max_new_tokens=300")
    seen.kl = run.command("kl", "fixed", "--target", "3")
    seen.undo_kl = run.command("undo")
    seen.note = lab.cli("note", run.name, "what is\x1b[31m this")
    seen.still_at = run.step
    seen.still = run.state

    run.hold(6)
    seen.unpause = run.command("unpause")
    seen.unpause_again = run.ctl("unpause")
    run.wait_at(6)
    engine = run.engine()
    run.hold(4)
    seen.roll_back = run.command("rollback", "3")
    run.wait_at(4)
    seen.rolled_back_to = run.step
    seen.same_engine = run.engine() == engine
    until(lambda: run.state == "running", "a running engine after the roll back")
    run.release(4, 6)
    run.finish()
    yield run
    run.end()


def test_a_pause_is_accepted_at_once_and_announced(held):
    assert held.seen.accepted.returncode == 0
    assert "next step boundary" in held.seen.accepted.stdout
    assert held.seen.pausing == "pausing"


def test_a_pause_takes_effect_at_the_end_of_the_current_step(held):
    assert held.seen.paused_at == 3
    assert held.commands()["hold-it"]["applied_step"] == 4


def test_no_step_completes_while_paused(held):
    assert held.seen.still_at == 3
    assert held.seen.still == "paused"


def test_the_status_estimates_the_time_to_the_boundary(held):
    assert held.seen.boundary_in is not None
    assert held.seen.boundary_in >= 0


def test_a_run_paused_and_rolled_back_has_the_numbers_of_the_uninterrupted_run(held, whole):
    # All changes were undone, and without reseeding the same steps are repeated.
    assert held.numbers() == whole.numbers()
    assert held.checkpoint(8)["hashes"] == whole.checkpoint(8)["hashes"]


def test_a_checkpoint_is_saved_while_paused(held):
    assert held.seen.checkpoint["status"] == "applied"
    assert held.checkpoint(3)["state"]["step"] == 3
    assert 3 in [e["step"] for e in held.events("checkpoint")]


def test_a_probe_has_responses_of_policy_and_reference_while_paused(held):
    result = held.seen.probe["result"]
    assert set(result) == {"policy", "reference"}
    for response in result.values():
        assert {"response", "score", "kl"} <= set(response)
    assert result["reference"]["kl"] == pytest.approx(0, abs=1e-3)


def test_a_result_has_the_step_and_the_changes(held):
    assert held.seen.beta["applied_step"] == 4
    (change,) = held.seen.beta["changes"]
    assert change["key"] == "beta"
    assert change["new"] == 0.7


def test_a_command_sent_twice_with_one_id_acts_once(held):
    assert held.seen.beta_again == held.seen.beta
    assert [e["id"] for e in held.events("command")].count("once") == 1


def test_undo_reverts_all_of_the_last_change(held):
    (change,) = held.seen.undo["changes"]
    assert change["key"] == "beta"
    assert change["old"] == 0.7
    assert change["new"] == held.seen.beta["changes"][0]["old"]
    restored = {c["key"]: c["new"] for c in held.seen.undo_kl["changes"]}
    assert restored == {"controller": "adaptive", "target": 6.0}


def test_waiting_for_a_command_times_out_with_its_own_exit_code(held):
    assert held.seen.timed_out.returncode == 4
    assert len(held.seen.timed_out.stderr.splitlines()) == 1
    # Only the wait timed out; the command is applied.
    assert held.commands()["late"]["status"] == "applied"


def test_a_command_that_does_not_apply_is_rejected_with_a_reason(held):
    for done, reason in (
        (held.seen.pause_again, "already paused"),
        (held.seen.unpause_again, "not paused"),
    ):
        assert done.returncode == 1
        assert reason in done.stderr


def test_an_undo_with_nothing_to_undo_is_rejected_at_the_boundary(held):
    rejected = [c for c in held.commands().values() if c["status"] == "rejected"]
    assert "there is no change to undo" in [c["reason"] for c in rejected]


def test_the_events_have_author_time_and_old_values_of_commands(held):
    for row in held.lab.json("events", held.name):
        assert {"kind", "time", "step"} <= set(row)
        if row["kind"] == "command":
            keys = {"id", "command", "status", "applied_step", "reason", "who", "old", "new"}
            assert keys <= set(row)
            assert row["who"]


def test_a_note_is_an_event_with_its_author(held):
    assert held.seen.note.returncode == 0
    (note,) = held.events("note")
    assert held.seen.note.stdout == f"noted at step {note['step']}: what is␛ this\n"
    assert note["text"] == "what is\x1b[31m this"
    assert note["who"]
    assert "\x1b" not in held.lab.cli("events", held.name).stdout


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("beta", "-1"), "beta must be"),
        (("beta", "nan"), "beta must be"),
        (("beta", "inf"), "beta must be"),
        (("kl", "adaptive", "--target", "0"), "target must be"),
        (("kl", "adaptive", "--horizon", "0.1"), "horizon"),
        (("kl", "adaptive", "--beta-min", "2", "--beta-max", "1"), "beta_min"),
        (("set", "train.steps=3"), "cannot be set"),
        (("set", "colour=red"), "these can"),
        (("set", "learning_rate=fast"), "learning_rate must be"),
        (("set", "clip_range=1.5"), "clip_range must be"),
        (("rollback", "77"), "no checkpoint of step 77"),
        (("probe", " "), "characters"),
    ],
)
def test_a_rejected_command_says_why_in_one_line_and_exits_1(endless, command, reason):
    done = endless.ctl(*command)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("rlhf-tui: rejected: ")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_of_several_settings_none_is_changed_if_one_is_wrong(endless):
    before = endless.lab.json("status", endless.name)["settings"]
    known = len(endless.commands())
    done = endless.ctl("set", "save_every=7", "clip_range=1.5", "--wait")
    assert done.returncode == 1
    assert "clip_range must be" in done.stderr
    assert "nothing is changed" in done.stderr
    assert len(endless.commands()) == known
    assert endless.lab.json("status", endless.name)["settings"] == before


def test_several_settings_are_changed_by_one_call(endless):
    arguments = ("set", "save_every=7", "clip_range=0.3", "--id", "two", "--wait", "--json")
    done = endless.ctl(*arguments)
    assert done.returncode == 0, done.stderr
    replies = json.loads(done.stdout)
    assert [(r["id"], r["status"]) for r in replies] == [("two", "applied"), ("two-2", "applied")]
    settings = endless.lab.json("status", endless.name)["settings"]
    assert (settings["save_every"], settings["clip_range"]) == (7, 0.3)


def test_responses_longer_than_the_models_positions_are_refused(held):
    assert held.seen.too_long["status"] == "rejected"
    assert "at most" in held.seen.too_long["reason"]


def test_a_rejected_command_leaves_every_reading_command_working(endless):
    endless.ctl("beta", "nan")
    assert endless.lab.json("events", endless.name)
    assert endless.lab.json("status", endless.name)


@pytest.mark.parametrize(
    "command", [("set", "beta"), ("kl", "sideways"), ("beta", "much"), ("fly",)]
)
def test_an_invalid_command_is_a_user_error(endless, command):
    done = endless.ctl(*command)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_beta_and_controller_change_at_the_step_the_acknowledgement_says(steered):
    commands = steered.commands()
    assert commands["to-0.2"]["applied_step"] == 4
    assert commands["aim"]["applied_step"] == 6
    betas = steered.betas()
    assert betas[4] == 0.2
    assert betas[3] != 0.2
    # From step 6 on the controller changes beta faster: horizon 50 instead of 500.
    assert abs(betas[7] / betas[6] - 1) > abs(betas[6] / betas[5] - 1)
    assert steered.checkpoint(8)["state"]["settings"]["horizon"] == 50.0


def test_a_learning_rate_set_during_a_step_is_used_in_the_next_step(steered):
    with steered.reader() as reader:
        rates = dict(reader.metrics.series("lr"))
    assert (rates[5], rates[6]) == (3e-4, 1e-4)


@pytest.mark.slow
def test_settings_are_in_force_after_a_resume(lab, steered):
    done = lab.cli("resume", "steered", "-o", "train.steps=9", "--headless")
    assert done.returncode == 0, done.stderr
    with steered.reader() as reader:
        assert dict(reader.metrics.series("lr"))[9] == 1e-4
        assert reader.meta().settings["target"] == 2.0
    assert steered.numbers()[8]["objective/kl_coef"] != 0.05


@pytest.mark.parametrize(
    "how",
    ["stop", *(pytest.param(how, marks=pytest.mark.slow) for how in ("SIGTERM", "stop --now"))],
)
def test_a_paused_run_can_be_stopped_when_the_disk_is_full(either_lab, how):
    # A checkpoint that could not be recorded would end the run by itself.
    run = either_lab.run(f"full-{how.replace(' ', '')}", "train.save_every=0", steps=1000)
    try:
        run.start()
        assert run.command("pause")["status"] == "applied"
        engine = run.engine()
        engine.rlimit(psutil.RLIMIT_FSIZE, (0, 0))  # no file of the engine's can grow
        if how == "SIGTERM":
            engine.terminate()
        else:
            done = run.ctl(*how.split())
            assert done.returncode == 0, done.stderr
            assert "cannot write the journal" in done.stderr
        run.wait_gone()
    finally:
        run.end()


def test_status_and_ls_say_that_a_run_waits_for_room_on_the_disk(either_lab):
    run = either_lab.run("waits", "train.save_every=0", steps=1000)

    def awaited():
        return run.lab.json("status", run.name)["waits_for"]

    try:
        run.start()
        engine = run.engine()
        limits = engine.rlimit(psutil.RLIMIT_FSIZE)
        engine.rlimit(psutil.RLIMIT_FSIZE, (0, limits[1]))  # no file of the engine's can grow
        until(lambda: awaited() == "room on the disk", "a wait")
        for command in (["status", run.name], ["ls"]):
            assert "waits for room on the disk" in run.lab.cli(*command).stdout
        engine.rlimit(psutil.RLIMIT_FSIZE, limits)
        until(lambda: awaited() is None, "the end of the wait")
    finally:
        run.end()


def test_a_roll_back_continues_from_the_checkpoint_in_the_same_engine(held):
    assert held.seen.roll_back["status"] == "applied"
    assert held.seen.rolled_back_to == 3
    assert held.seen.same_engine


def test_the_log_says_where_and_why_each_attempt_begins(held):
    who = held.commands()[held.seen.roll_back["id"]]["who"]
    log = held.session.log_file.read_text()
    begun = [line.partition(" INFO ")[2] for line in log.splitlines() if " begins from " in line]
    assert begun == [
        f"attempt 1 begins from step 0: start by {who}",
        f"attempt 2 begins from step 3: roll back by {who}",
    ]
    with held.reader() as reader:
        assert [a.from_step for a in reader.attempts()] == [0, 3]


@pytest.mark.slow
def test_a_reseeded_roll_back_survives_a_crash_before_the_next_save(lab):
    def third_step(attempt):
        def rows():
            with run.reader() as reader:
                return [row for row in reader.metrics.rows() if row.step == 3]

        (row,) = until(lambda: [r for r in rows() if r.attempt == attempt], f"step 3 of {attempt}")
        return row.values["objective/scores"], row.values["objective/kl"]

    run = lab.run("reseeded", "train.save_every=2")
    run.hold(4)
    try:
        run.start()
        run.wait_at(4)
        run.wait_saved(2)
        first = third_step(1)
        run.hold(4)
        assert run.command("rollback", "2", "--reseed")["status"] == "applied"
        run.wait_at(4)
        reseeded = third_step(2)
        assert reseeded != first
        os.kill(run.rank().pid, signal.SIGKILL)
        assert third_step(3) == reseeded
    finally:
        run.end()


async def test_an_assistant_steers_a_live_run_under_its_own_name(endless):
    mcp = pytest.importorskip("mcp")
    server = mcp.StdioServerParameters(
        command=str(endless.lab.program), args=["mcp", "--allow-steering"],
        env=endless.lab.environment,
    )  # fmt: skip
    info = mcp.Implementation(name="helper", version="1")
    async with mcp.Client(server, mode="legacy", client_info=info) as assistant:
        arguments = {"session": endless.name, "value": 0.3}
        applied = (await assistant.call_tool("set_beta", arguments)).structured_content
        undone = (await assistant.call_tool("undo", {"session": endless.name})).structured_content
    assert applied["changes"][0]["new"] == undone["changes"][0]["old"] == 0.3
    with endless.reader() as reader:
        *_, beta, undo = reader.commands()
    assert beta.who.startswith("assistant helper of ")
    assert beta.who == undo.who
