"""What the steering panel says, line by line."""

import msgspec
import pytest

from engine.config.settings import SettingChange, Settings
from engine.protocol.rank_messages import Phase
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.widgets.lines import plain_text
from rlhf_tui.widgets.panels.steering import SteeringPanel
from tests.tui.panels import FIRST, SETTINGS, command, make_state, text

BETA = [SettingChange(key="beta", old=0.04, new=0.05)]


def restart_from(step):
    return msgspec.structs.replace(FIRST, attempt=2, from_step=step)


def test_a_first_start_says_that_it_starts():
    panel = SteeringPanel(make_state(state="starting", settings={}))
    assert "starting …" in text(panel)


def test_the_target_s_unit_is_left_out_where_it_has_no_room():
    panel = SteeringPanel(make_state(settings=SETTINGS | {"target": 0.5}))
    assert "target 0.5 nats" in text(panel, 42)
    assert "target 0.5\n" in text(panel, 41)


@pytest.mark.parametrize(("kl", "share"), [(-0.02, "▼ 0.00×"), (-0.6, "▼ -0.10×"), (6, "• 1.00×")])
def test_the_kl_is_shown_as_a_share_of_the_target_without_a_negative_zero(kl, share):
    assert f"{share} target 6 nats" in text(SteeringPanel(make_state(kl=kl)))


def test_the_next_beta_is_the_controller_s():
    # e = 6.6/6 - 1 = 0.1 and n/horizon = 0.1, so beta grows by 1 %.
    assert "0.0505   +1.0%" in text(SteeringPanel(make_state(kl=6.6)))


def test_the_next_beta_is_unknown_without_the_batch_size_of_the_configuration():
    state = make_state(kl=6.6)
    state.batch_size = None
    rows = [row for row in SteeringPanel(state).rows(39, 20) if row[0][0].strip() == "next"]
    assert plain_text(rows, 39) == " next    config.yaml is not read", "it is whole at 80 columns"


def test_a_saturated_controller_says_so():
    panel = SteeringPanel(make_state(kl=60.0))
    assert "+2.0% saturated: ×2 in 36 steps" in text(panel)  # 1.02^36 = 2.04
    assert "-2.0% saturated: ×½ in 35 steps" in text(SteeringPanel(make_state(kl=0.1)))
    assert "+2.0% saturated" in text(panel, 39)


def test_a_controller_that_cannot_double_beta_before_the_end_is_too_slow():
    settings = SETTINGS | {"horizon": 1e5}
    panel = SteeringPanel(make_state(kl=60.0, settings=settings))
    assert "+0.02% saturated: ×2 in 3,467 steps" in text(panel)
    assert "+0.02% too slow" in text(panel, 39)


def test_a_bound_that_holds_beta_says_so():
    settings = SETTINGS | {"beta": 1.0}
    assert "at its bound" in text(SteeringPanel(make_state(kl=60.0, settings=settings)))


def test_a_fixed_beta_stays_and_the_panel_says_what_the_controller_would_do():
    settings = SETTINGS | {"controller": "fixed"}
    shown = text(SteeringPanel(make_state(kl=6.6, settings=settings)))
    assert "unchanged; adaptive would give 0.0505" in shown


def test_beta_names_who_set_it():
    state = make_state()
    change = [SettingChange(key="beta", old=0.04, new=0.05)]
    done = command("applied", applied_step=12, changes=change, ended=2.0)
    state.take(SessionUpdate(commands=[done]))
    assert "continues from ana's, step 12" in text(SteeringPanel(state))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (command("queued"), "queued"),
        (command("accepted", accepted=1.0), "accepted"),
        (command("applied", applied_step=51, ended=2.0), "✓ applied at step 51"),
        (command("applied", command="pause", applied_step=51), "✓ paused after step 50"),
        (command("applied", command="checkpoint", applied_step=51), "✓ step 50 saved"),
        (
            command("applied", command="delete-checkpoint", args={"step": 25}, applied_step=51),
            "delete-checkpoint 25  ✓ done",
        ),
        (command("rejected", reason="too much", ended=2.0), "✗ rejected: too much"),
    ],
)
def test_a_command_s_life_is_shown(given, words):
    state = make_state()
    state.take(SessionUpdate(commands=[given]))
    assert words in text(SteeringPanel(state))


def test_a_pending_command_has_a_line_even_in_the_smallest_panel():
    state = make_state()
    state.take(SessionUpdate(commands=[command("accepted", accepted=1.0)]))
    assert "accepted" in text(SteeringPanel(state), 40, 6)


def test_the_step_at_which_a_pending_command_applies_is_whole_in_a_narrow_panel():
    state = make_state()
    update = SessionUpdate(
        commands=[command("accepted", command="probe", args={"text": "The film"}, accepted=1.0)],
        phases=[Phase(rank=0, step=51, name="generate")],
    )
    state.take(update)
    assert "⧗ at step 52 in ~10s" in text(SteeringPanel(state), 39)


def test_a_narrow_panel_has_the_step_of_a_pause_too():
    state = make_state()
    state.take(SessionUpdate(commands=[command("applied", command="pause", applied_step=51)]))
    assert "✓ after step 50" in text(SteeringPanel(state), 39)


def test_read_only_stands_in_the_panel_s_heading():
    panel = SteeringPanel(make_state())
    panel.read_only = True
    assert "read-only" in text(panel)
    assert "±10%" not in text(panel)


def test_the_settings_of_these_tests_are_the_engine_s():
    assert msgspec.convert(SETTINGS, Settings, strict=False).beta == 0.05


def test_while_models_are_loaded_no_setting_of_the_last_attempt_is_shown():
    state = make_state(state="starting", attempts=[FIRST, restart_from(25)])
    shown = text(SteeringPanel(state))
    assert "restarting from step 25" in shown
    assert not {"0.05", "controller", "configuration", "target"} & set(shown.split())


def test_a_change_on_an_abandoned_branch_is_marked():
    state = make_state()
    done = command("applied", applied_step=12, changes=BETA, ended=2.0, live=False)
    state.take(SessionUpdate(commands=[done]))
    assert "applied at step 12, abandoned" in text(SteeringPanel(state))


def test_without_an_engine_the_heading_offers_no_key():
    assert "±10%" not in text(SteeringPanel(make_state(state="stopped", pid=None)))


def test_a_command_s_outcome_is_never_cut_for_its_text():
    state = make_state()
    given = {"command": "probe", "args": {"text": "The film about the old sailor was"}}
    done = command("applied", applied_step=12, ended=2.0, **given)
    state.take(SessionUpdate(commands=[done]))
    row = SteeringPanel(state).rows(39, 12)[-1]
    assert sum(len(piece) for piece, _ in row) == 39
    assert row[-1][0].endswith("✓ step 12")


def test_a_setting_that_a_command_names_but_does_not_change_is_left_out():
    same = SettingChange(key="controller", old="adaptive", new="adaptive")
    target = SettingChange(key="target", old=5.0, new=4.0)
    state = make_state()
    done = command("applied", applied_step=12, changes=[same, target], ended=2.0)
    state.take(SessionUpdate(commands=[done]))
    shown = text(SteeringPanel(state))
    assert "target 5 → 4" in shown
    assert "controller adaptive" not in shown
