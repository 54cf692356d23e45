"""What each command declares, and at which moments it is accepted."""

import typing

import msgspec
import pytest

from engine import starter
from engine.config import file as config_file
from engine.config.settings import settings_of
from engine.errors import CommandRejectedError, ConfigError
from engine.protocol.commands import (
    COMMANDS,
    MAX_TEXT,
    BoundaryCommand,
    Command,
    DeleteCheckpoint,
    Moment,
    Note,
    Pause,
    Probe,
    Rollback,
    SetBeta,
    SetKLController,
    SetSetting,
    Stop,
    SupervisorCommand,
    Unpause,
    check_command,
    check_in_order,
)
from engine.session.states import ENDED_STATES, LIVE_STATES, STATES, TRANSITIONS, is_legal
from rlhf_tui.commands.steer import ctl, note

CONFIG = config_file.load(starter.FOLDER / "demo.yaml")


def moment(**changed):
    values = {
        "state": "running", "paused": False, "settings": settings_of(CONFIG),
        "config": CONFIG, "checkpoint_steps": lambda: [2, 4],
        "needed_steps": lambda: {4},
        "saved_steps": lambda: [2, 4, 6],
    }  # fmt: skip
    return Moment(**(values | changed))


def every_command(kind=Command):
    """Each struct below the base that has a tag of its own."""
    for below in kind.__subclasses__():
        if below.__subclasses__():
            yield from every_command(below)
        else:
            yield below


@pytest.mark.parametrize("kind", every_command(), ids=lambda kind: kind.__name__)
def test_each_command_declares_everything(kind):
    assert COMMANDS[kind.name()] is kind  # so it is a member of one of the two unions
    assert kind.summary.endswith(".")
    assert "\n" not in kind.summary
    assert isinstance(kind.on_charts, bool)
    assert kind.state_when_accepted in (None, *LIVE_STATES)


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=lambda kind: kind.__name__)
def test_each_command_has_its_verb_and_its_own_line_of_help(kind):
    verb = note if kind is Note else ctl.commands[kind.name()]
    assert verb.help == kind.summary


def test_who_carries_a_command_out_is_its_union():
    at_once = set(typing.get_args(SupervisorCommand))
    at_boundary = set(typing.get_args(BoundaryCommand))
    assert at_once | at_boundary == set(COMMANDS.values())
    assert at_once & at_boundary == {Stop}


@pytest.mark.parametrize(
    ("command", "given", "reason"),
    [
        (Pause(), {"paused": True, "state": "paused"}, "already paused"),
        (Pause(), {"paused": True, "state": "pausing"}, "already paused"),
        (Unpause(), {}, "not paused"),
        (Stop(), {"state": "stopping"}, "already stopping"),
        (Pause(), {"state": "stopping"}, "resume it first"),
        (Rollback(step=2), {"state": "stopping"}, "resume it first"),
        (Rollback(step=3), {}, "there are: 2, 4"),
        (Rollback(step=3), {"checkpoint_steps": list}, "none yet"),
        (DeleteCheckpoint(step=3), {}, "there are: 2, 4, 6"),
        (DeleteCheckpoint(step=3), {"saved_steps": list}, "none yet"),
        (DeleteCheckpoint(step=4), {}, "is the one that a resume continues from"),
        (SetBeta(value=-1), {}, "beta must be"),
        (SetSetting(key="epochs", value=2**64 - 1), {}, "a whole number of at most 1000"),
        (SetSetting(key="learning_rate", value=5e-324), {}, "must be a number of at least 1e-12"),
        (SetSetting(key="temperature", value=1e-300), {}, "must be a number of at least 1e-06"),
        (SetSetting(key="stop_kl", value="x"), {}, "must be a number, or null"),
        (SetSetting(key="seed", value=1), {}, "cannot be set"),
        (SetSetting(key="dual_clip", value=1), {}, "must be a number above 1"),
        (SetSetting(key="loss_aggregation", value="x"), {}, "one of token, sequence, sequence_sum"),
        (
            SetKLController(controller="adaptive", horizon=0.1),
            {},
            r"kl\.horizon \(0\.1\) is too small",
        ),
        (Probe(text=" "), {}, "1 to 10000 characters"),
        (Note(text="x" * (MAX_TEXT + 1)), {}, "1 to 10000 characters"),
    ],
)
def test_what_cannot_be_carried_out_at_a_moment_is_rejected_and_says_why(command, given, reason):
    with pytest.raises(CommandRejectedError, match=reason):
        check_command(command, moment(**given))


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (Stop(now=True), {"state": "stopping"}),
        (Note(text="n"), {"state": "stopping"}),
        (Pause(), {"state": "pausing"}),  # and an accepted unpause after it
        (Unpause(), {"paused": True, "state": "pausing"}),
        (Unpause(), {"paused": True, "state": "starting"}),
        (Rollback(step=4), {}),
        (DeleteCheckpoint(step=6), {}),  # of an abandoned branch
        (DeleteCheckpoint(step=2), {"state": "stopping"}),
        (Probe(text="x" * MAX_TEXT), {"paused": True, "state": "paused"}),
    ],
)
def test_what_can_be_carried_out_is_accepted(command, given):
    check_command(command, moment(**given))


@pytest.mark.parametrize(
    ("given", "command", "key", "value"),
    [
        ([], SetKLController(controller="adaptive", horizon=5), "kl.horizon", 5),
        (
            ["reward.overlong.buffer=16"],
            SetSetting(key="max_new_tokens", value=8),
            "rollout.max_new_tokens",
            8,
        ),
        (
            ["eval={every: 5, holdout: 8}", "train.best_metric=eval/score"],
            SetSetting(key="save_every", value=12),
            "train.save_every",
            12,
        ),
    ],
)
def test_a_change_that_contradicts_other_keys_is_refused_like_in_the_file(
    given, command, key, value
):
    config = config_file.override(CONFIG, given)
    with pytest.raises(ConfigError) as in_file:
        config_file.override(config, [f"{key}={value}"])
    with pytest.raises(CommandRejectedError) as live:
        check_command(command, moment(config=config, settings=settings_of(config)))
    assert str(live.value) == str(in_file.value)


def test_a_run_whose_configuration_breaks_a_newer_rule_can_still_be_changed():
    broken = msgspec.structs.replace(
        CONFIG, kl=msgspec.structs.replace(CONFIG.kl, place="loss", estimator="k1")
    )
    check_command(SetBeta(value=0.2), moment(config=broken))


def test_only_commands_that_change_settings_say_that_they_do():
    examples = {SetBeta: {"value": 1}, SetSetting: {"key": "beta", "value": 1},
                SetKLController: {"controller": "fixed"}, Rollback: {"step": 2},
                DeleteCheckpoint: {"step": 2}, Probe: {"text": "t"},
                Note: {"text": "n"}}  # fmt: skip
    changing = {
        kind
        for kind in COMMANDS.values()
        if msgspec.convert(examples.get(kind, {}) | {"command": kind.name()}, kind).new_values(
            settings_of(CONFIG)
        )
    }
    assert changing == {SetBeta, SetSetting, SetKLController}


def test_a_session_is_live_until_no_state_can_follow():
    assert (*LIVE_STATES, *ENDED_STATES) == STATES
    assert ENDED_STATES == ("finished", "stopped", "failed")
    assert all(is_legal(state, "failed") for state in LIVE_STATES)
    assert not any(is_legal(state, "starting") for state in ENDED_STATES)
    assert is_legal(None, "starting")
    assert not is_legal(None, "running")
    assert set().union(*TRANSITIONS.values()) == set(STATES)


def test_changes_in_order_are_each_checked_against_those_before_them():
    bounds = [SetSetting(key="beta_max", value=50.0), SetSetting(key="beta_min", value=20.0)]
    settings = settings_of(CONFIG)
    check_in_order(bounds, settings, CONFIG)
    with pytest.raises(CommandRejectedError, match="beta_min"):
        check_in_order(bounds[::-1], settings, CONFIG)
