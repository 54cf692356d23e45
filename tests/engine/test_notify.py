"""Channels that send alerts."""

import json

import msgspec

from engine.config.schema import NotifyConfig
from engine.monitoring.guardrails import Alert
from engine.monitoring.notify import CHANNELS, CommandChannel, open_channels

ALERT = Alert("kl_high", "notify", "too much", 7, {"value": float("nan")})


def test_each_key_of_the_configuration_has_its_channel():
    assert set(CHANNELS) == {f.name for f in msgspec.structs.fields(NotifyConfig)}


def test_only_channels_that_are_named_are_opened():
    assert open_channels(NotifyConfig()) == []
    assert open_channels(NotifyConfig(command="")) == []
    (channel,) = open_channels(NotifyConfig(command="true"))
    assert isinstance(channel, CommandChannel)


async def test_a_command_receives_the_alert_as_json_and_its_text(tmp_path):
    command = f'cat > {tmp_path}/alert; echo "$RLHF_TUI_SESSION: $RLHF_TUI_ALERT" > {tmp_path}/text'
    await CommandChannel(command).send("run", ALERT)
    received = json.loads((tmp_path / "alert").read_text())
    assert received == {"rule": "kl_high", "action": "notify", "text": "too much",
                    "value": None, "session": "run", "step": 7}  # fmt: skip
    assert (tmp_path / "text").read_text() == "run: too much\n"


async def test_a_command_that_fails_is_logged_whatever_it_prints(caplog):
    await CommandChannel(r"printf '\377no route' >&2; exit 3").send("run", ALERT)
    assert "notify.command failed (3): \ufffdno route" in caplog.text
