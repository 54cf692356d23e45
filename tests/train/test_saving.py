"""Background saves: what a step boundary waits for, and what it does not."""

import contextlib
import shutil

import pytest
from msgspec.structs import replace

from engine.config.settings import SettingChange
from engine.errors import CheckpointError
from engine.protocol.commands import Checkpoint, SetBeta, SetSetting, Stop, Undo
from engine.protocol.rank_messages import (
    Applied,
    Begin,
    CheckpointComplete,
    CheckpointKept,
    CheckpointWritten,
    Notice,
    Paused,
    RankCommand,
    RankHello,
    RepeatedChange,
)
from engine.session.checkpoints import checkpoint_path, complete_checkpoints, saved_settings
from engine.train.boundary import Boundary
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints.manager import settings_digest
from engine.train.evaluation.scheduled import measure_before_training
from engine.train.rewards.source import RewardCallError
from tests.train.supervisor_end import METRICS
from tests.waiting import until


def save_three(run, boundary, supervisor, made_up):
    """Saves three steps of which the first is best by an evaluation; returns what is removed."""
    train = replace(run.config.train, best_metric="eval/score", keep_best=1)
    run.config = replace(run.config, train=train)
    supervisor.may_confirm.set()
    boundary.checkpoints.save()
    if made_up:
        boundary.evaluated({"eval/score": 5.0})
    for step in (2, 3):
        boundary.after_step(step, METRICS | {"eval/score": 1.0}, 0.1)
        boundary.checkpoints.save()
    until(lambda: len(supervisor.of(CheckpointComplete)) == 3)
    return [step for message in supervisor.of(CheckpointComplete) for step in message.removed]


def test_a_checkpoint_is_the_best_one_by_an_evaluation_that_was_made_up_for_later(trained):
    run, _, boundary, supervisor = trained
    assert save_three(run, boundary, supervisor, made_up=True) == [2]


def test_a_checkpoint_that_an_operator_saved_stays_also_after_a_restart(trained, link):
    run, session, first, supervisor = trained
    supervisor.may_confirm.set()
    assert first.checkpoints.save_and_keep() is None
    until(lambda: supervisor.of(CheckpointKept) == [CheckpointKept(step=1)])
    first.after_step(2, dict(METRICS), 0.1)
    first.checkpoints.save()
    first.close()
    begin = Begin(attempt=2, from_step=2, checkpoints=[1, 2], kept=[1])
    with contextlib.closing(Boundary(session, run, begin, link)) as boundary:
        boundary.after_step(3, dict(METRICS), 0.1)
        boundary.checkpoints.save()
    assert list(complete_checkpoints(session.checkpoints)) == [1, 3]


def test_a_step_that_is_saved_already_is_kept_when_an_operator_asks_for_it(trained):
    _, _, boundary, supervisor = trained
    supervisor.may_confirm.set()
    boundary.checkpoints.save()
    assert boundary.checkpoints.save_and_keep() is None
    until(lambda: supervisor.of(CheckpointKept) == [CheckpointKept(step=1)])


def test_after_a_restart_it_is_still_the_best_one(trained, link):
    run, session, first, supervisor = trained
    first.close()
    begin = Begin(attempt=2, from_step=0, best={1: 5.0})
    with contextlib.closing(Boundary(session, run, begin, link)) as boundary:
        boundary.after_step(1, dict(METRICS), 0.1)
        assert save_three(run, boundary, supervisor, made_up=False) == [2]


@pytest.mark.parametrize(
    ("keeps", "removed"), [(True, [[], [], [2], [3]]), (False, [[], [1], [2], [3]])]
)
def test_the_checkpoint_before_an_alert_is_kept_until_the_alert_has_cleared(
    trained, keeps, removed
):
    run, _, boundary, supervisor = trained
    run.config = replace(run.config, train=replace(run.config.train, keep_before_alert=keeps))
    supervisor.may_confirm.set()
    boundary.checkpoints.save()
    for step, alerts in ((2, [2]), (3, [2]), (4, [2])):
        supervisor.alerts = alerts
        boundary.after_step(step, dict(METRICS), 0.1)
        boundary.checkpoints.save()
    until(lambda: len(supervisor.of(CheckpointComplete)) == 4)
    assert [message.removed for message in supervisor.of(CheckpointComplete)] == removed
    supervisor.alerts = []
    boundary.after_step(5, dict(METRICS), 0.1)
    boundary.checkpoints.save()
    until(lambda: len(supervisor.of(CheckpointComplete)) == 5)
    assert supervisor.of(CheckpointComplete)[-1].removed == ([1, 4] if keeps else [4])


def test_the_next_step_begins_before_the_checkpoint_is_complete(trained):
    run, session, boundary, supervisor = trained
    boundary.checkpoints.save_if_due()
    assert boundary.before_step()
    boundary.after_step(2, dict(METRICS), 0.1)
    assert complete_checkpoints(session.checkpoints) == {}
    supervisor.may_confirm.set()
    assert supervisor.wait_for(CheckpointComplete).step == 1
    assert [*complete_checkpoints(session.checkpoints)] == [1]
    assert run.state.step == 2


def test_a_controller_that_begins_again_from_beta_zero_says_so(trained):
    run, _, boundary, supervisor = trained
    kl = replace(run.config.kl, controller="adaptive", beta=0.0, beta_min=0.002)
    run.config = replace(run.config, kl=kl)
    boundary.after_step(2, dict(METRICS), 0.1)
    notice = supervisor.wait_for(Notice)
    assert (notice.step, run.config.kl.beta) == (2, 0.002)
    assert notice.text.endswith("it begins again at beta_min, 0.002")


def test_a_checkpoint_becomes_complete_without_another_boundary(trained):
    _, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    boundary.checkpoints.save_if_due()
    until(lambda: [*complete_checkpoints(session.checkpoints)] == [1])


def test_a_checkpoint_is_complete_only_after_the_journal_is_confirmed(trained):
    _, session, boundary, supervisor = trained
    boundary.checkpoints.save_if_due()
    assert supervisor.wait_for(CheckpointWritten).step == 1
    assert checkpoint_path(session.checkpoints, 1).is_dir()
    assert complete_checkpoints(session.checkpoints) == {}


def test_a_command_that_arrives_during_a_save_is_executed_at_the_next_boundary(trained):
    run, _, boundary, supervisor = trained
    boundary.checkpoints.save_if_due()
    supervisor.wait_for(CheckpointWritten)
    supervisor.send(RankCommand(id="quick", command=SetSetting(key="learning_rate", value=1e-5)))
    until(lambda: boundary.before_step() and run.config.train.learning_rate == 1e-5)
    assert supervisor.wait_for(Applied).step == 2
    assert not supervisor.of(CheckpointComplete)


def test_a_checkpoint_command_gets_its_reply_when_the_checkpoint_is_complete(trained):
    _, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    supervisor.send(RankCommand(id="keep", command=Checkpoint()))
    until(lambda: boundary.before_step() and supervisor.of(Applied))
    kinds = [type(m) for m in supervisor.received]
    assert kinds.index(CheckpointComplete) < kinds.index(Applied)
    assert [*complete_checkpoints(session.checkpoints)] == [1]


def test_a_checkpoint_has_the_settings_after_its_step_whatever_was_changed_before_the_save(trained):
    run, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    before = run.config.kl.beta
    supervisor.send(RankCommand(id="change", command=SetBeta(value=0.808)))
    supervisor.send(RankCommand(id="keep", command=Checkpoint()))
    until(lambda: boundary.before_step() and len(supervisor.of(Applied)) == 2)
    assert run.config.kl.beta == 0.808
    assert saved_settings(checkpoint_path(session.checkpoints, 1))["beta"] == before


def test_a_checkpoint_command_waits_for_a_running_save_of_the_same_step(trained):
    _, _, boundary, supervisor = trained
    boundary.checkpoints.save_if_due()
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    assert [m.step for m in supervisor.of(CheckpointWritten)] == [1]


def test_a_failed_save_is_a_notice_of_its_step_and_the_run_continues(trained, monkeypatch):
    _, session, boundary, supervisor = trained

    def no_room(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_folder, "publish", no_room)
    boundary.checkpoints.save_if_due()
    notice = supervisor.wait_for(Notice)
    assert (notice.step, notice.rule) == (1, "checkpoint")
    assert "No space left" in notice.text
    assert boundary.before_step()
    assert list(session.checkpoints.iterdir()) == []
    monkeypatch.undo()
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None  # the same step, now that there is space
    assert [*complete_checkpoints(session.checkpoints)] == [1]


def test_a_checkpoint_that_cannot_be_marked_complete_is_a_notice_and_the_run_continues(trained):
    _, session, boundary, supervisor = trained
    boundary.checkpoints.save_if_due()
    supervisor.wait_for(CheckpointWritten)
    # A dangling link: not even root can create the file.
    part = checkpoint_path(session.checkpoints, 1) / ".COMPLETE.part"
    part.symlink_to("no such folder/COMPLETE")
    supervisor.may_confirm.set()
    notice = supervisor.wait_for(Notice)
    assert (notice.step, notice.rule) == (1, "checkpoint")
    assert not part.is_symlink()
    assert not supervisor.of(CheckpointComplete)
    assert boundary.before_step()
    assert boundary.checkpoints.save() is None  # the same step, now that it is possible
    assert [*complete_checkpoints(session.checkpoints)] == [1]


def test_a_run_that_fails_lets_a_running_save_finish(trained):
    _, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    boundary.checkpoints.save_if_due()
    boundary.close()
    assert [*complete_checkpoints(session.checkpoints)] == [1]


def test_the_time_that_saving_blocked_a_step_is_in_its_metrics(trained):
    _, _, boundary, supervisor = trained
    boundary.checkpoints.save_if_due()
    metrics = dict(METRICS)
    boundary.after_step(2, metrics, 0.1)
    assert metrics["time/checkpoint"] > 0
    supervisor.may_confirm.set()


def test_ranks_may_differ_in_the_last_bit_of_beta_when_they_save(trained):
    state = trained[0].saved_state()
    settings = state.settings
    nearly = replace(state, settings=replace(settings, beta=settings.beta * (1 + 2**-52)))
    assert nearly.settings != settings
    assert settings_digest(nearly) == settings_digest(state)
    assert settings_digest(replace(state, settings=replace(settings, epochs=7))) != settings_digest(
        state
    )


def test_a_run_that_has_taken_its_last_step_does_not_pause_for_a_reward(trained):
    run, _, boundary, supervisor = trained
    run.config = replace(run.config, train=replace(run.config.train, steps=1))
    boundary.pause_before_step(RewardCallError("no service; step 1 is not evaluated"))
    assert not boundary.before_step()
    assert supervisor.wait_for(Notice).rule == "reward"
    assert supervisor.of(Paused) == []


def test_a_run_that_is_stopped_before_its_scores_are_normalised_evaluates_nothing(
    make_run, supervisor, link
):
    run, session = make_run("reward.normalise=reference", "eval.every=1", "eval.holdout=4")
    calls = []

    def fail(*_args, **_options):
        calls.append(1)
        raise RewardCallError("no service")

    run.rewards.total = fail
    boundary = Boundary(session, run, Begin(attempt=1, from_step=0), link)
    supervisor.wait_for(RankHello)
    supervisor.send(RankCommand(id="1", command=Stop()))
    assert measure_before_training(boundary, run, run.config).metrics == {}
    assert len(calls) == 1
    boundary.close()


def test_an_undo_that_later_changes_have_replaced_takes_nothing_back_in_a_resume(trained, link):
    run, session, _, supervisor = trained
    change = SettingChange(key="beta", old=0.3, new=run.config.kl.beta)
    replaced = RepeatedChange(step=2, command="undo", changes=[])
    begin = Begin(attempt=2, from_step=0, repeat=[replaced], undoable=[[change]])
    again = Boundary(session, run, begin, link)
    supervisor.send(RankCommand(id="undo", command=Undo()))
    until(lambda: again.before_step() and supervisor.of(Applied))
    assert run.config.kl.beta == 0.3


def test_an_undo_skips_a_command_that_changed_nothing(trained):
    run, _, boundary, supervisor = trained
    before = run.config.kl.beta
    commands = [SetBeta(value=0.3), SetBeta(value=0.3), Undo()]
    for number, command in enumerate(commands):
        supervisor.send(RankCommand(id=str(number), command=command))
    until(lambda: boundary.before_step() and len(supervisor.of(Applied)) == len(commands))
    assert run.config.kl.beta == before


def test_the_settings_that_are_reported_have_what_a_resume_repeats_before_the_next_step(
    trained, link
):
    """The steering panel and the guard rails would otherwise have those of the checkpoint."""
    run, session, _, _ = trained
    in_force = run.config.kl.beta
    repeated = [
        RepeatedChange(
            step=step, command="beta", changes=[SettingChange(key="beta", old=0.1, new=new)]
        )
        for step, new in ((2, 0.7), (3, 0.9))
    ]
    again = Boundary(session, run, Begin(attempt=2, from_step=1, repeat=repeated), link)
    assert again.next_settings()["beta"] == 0.7
    assert run.config.kl.beta == in_force
    assert again.before_step()
    assert run.config.kl.beta == again.next_settings()["beta"] == 0.7


def test_the_space_that_a_save_asks_for_is_more_than_is_free(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=51_000_000)
    monkeypatch.setattr(checkpoint_folder.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(CheckpointError, match="it needs 54 MB and 51 MB are free"):
        checkpoint_folder.check_space(tmp_path, 49_000_000)
