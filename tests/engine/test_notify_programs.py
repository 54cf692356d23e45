"""Notifications by programs of the machine: a command of the user's, and e-mail."""

import asyncio
import json
import socket
from email import message_from_bytes, policy

import pytest

from engine.config.sections.supervision import NotifyConfig
from engine.monitoring import notify
from engine.monitoring.channels.command import MAX_OUTPUT, CommandChannel
from engine.monitoring.channels.message import Notification, NotificationError, of_alert, trial
from engine.monitoring.channels.sendmail import EmailChannel
from engine.monitoring.guardrails import Alert
from engine.monitoring.notify import Notifier
from tests.engine.supervised import until
from tests.waiting import is_running

MESSAGE = of_alert("run", Alert("kl_high", "notify", "KL is high", 7))


async def test_a_command_receives_the_alert_as_json_and_its_text(tmp_path):
    command = f'cat >> {tmp_path}/all; echo "$RLHF_TUI_SESSION: $RLHF_TUI_ALERT" > {tmp_path}/text'
    for _ in range(2):
        await CommandChannel(command).send(of_alert("run", Alert("r", "notify", "too much", 7)))
    received, again = map(json.loads, (tmp_path / "all").read_text().splitlines())
    assert received == {"rule": "r", "action": "notify", "text": "too much", "session": "run",
                        "step": 7, "kind": "alert", "level": "warning", "unsent": 0}  # fmt: skip
    assert again == received  # a line each
    assert (tmp_path / "text").read_text() == "run: too much\n"


async def test_a_text_that_no_environment_takes_is_sent_all_the_same(tmp_path):
    text = "\0" + "x" * 200_000
    message = Notification("run", "pause", "error", text, 3)
    await CommandChannel(
        f'cat > {tmp_path}/json; printf %s "$RLHF_TUI_ALERT" > {tmp_path}/text'
    ).send(message)
    assert json.loads((tmp_path / "json").read_text())["text"] == text
    assert (tmp_path / "text").read_text().startswith(" xxx")


async def test_a_command_that_fails_is_reported_whatever_it_prints():
    with pytest.raises(NotificationError, match="exit status 3: \ufffdno route"):
        await CommandChannel(r"printf '\377no route' >&2; exit 3").send(MESSAGE)


async def test_a_command_cannot_fill_the_memory_with_what_it_prints():
    flood = CommandChannel(f"printf '\\377no route' >&2; head -c {2 * MAX_OUTPUT} /dev/zero >&2")
    with pytest.raises(NotificationError, match="exit status 1: \ufffdno route"):
        await flood.send(MESSAGE)


async def test_a_command_that_hangs_is_killed_with_its_children(tmp_path):
    hanging = asyncio.create_task(
        CommandChannel(f"cat; sleep 600 & echo $! > {tmp_path}/pid; wait").send(MESSAGE)
    )
    pid = tmp_path / "pid"
    await until(lambda: pid.exists() and pid.read_text().strip())
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    child = int(pid.read_text())
    await until(lambda: not is_running(child))


async def test_a_command_that_leaves_a_process_behind_does_not_hold_up_the_next_message(caplog):
    """The process that left its group has inherited all that the command had open."""
    caplog.set_level("INFO")
    notifier = Notifier(NotifyConfig(command="setsid sleep 8 &"))
    async with asyncio.timeout(notify.SEND_TIMEOUT):
        for _ in range(2):
            notifier.submit(MESSAGE)
        await notifier.finish()
    assert caplog.text.count("notify.command sent") == 2


async def test_an_e_mail_has_one_subject_line_and_goes_to_each_address(tmp_path):
    program = tmp_path / "sendmail"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/letter\n')
    program.chmod(0o700)
    hostile = Notification("run", "alert", "info", "high\nBcc: eve@example.org", 7)
    await EmailChannel(["a@example.org", "b@example.org"], str(program)).send(hostile)
    arguments = (tmp_path / "arguments").read_text()
    assert arguments == "-i -- a@example.org b@example.org\n"
    headers = (tmp_path / "letter").read_text().partition("\n\n")[0].splitlines()
    assert "Subject: [rlhf-tui] run step 7: high Bcc: eve@example.org" in headers
    assert not [h for h in headers if h.startswith("Bcc")]


async def test_an_e_mail_says_how_to_open_the_session_on_its_machine_and_on_another(tmp_path):
    program, root = tmp_path / "sendmail", tmp_path / "my sessions"
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/letter\n")
    program.chmod(0o700)
    mail = EmailChannel(["a@example.org"], str(program))
    notifier = Notifier(NotifyConfig(), [mail], root=root)
    notifier.submit(MESSAGE)
    await notifier.finish()
    letter = message_from_bytes((tmp_path / "letter").read_bytes(), policy=policy.default)
    body, host, name = letter.get_content(), socket.gethostname(), MESSAGE.session
    assert f"On {host}:\n" in body
    assert f"rlhf-tui attach {name} --sessions '{root}'\n" in body
    assert f"\nrlhf-tui attach ssh://{host}/{name} --sessions '{root}'\n" in body


async def test_an_e_mail_without_a_mail_program_says_what_to_do():
    with pytest.raises(NotificationError, match="install a mail transfer agent"):
        await EmailChannel(["a@example.org"], "no-such-sendmail").send(trial("run"))
