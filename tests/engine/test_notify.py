"""Notifications: what is sent, in which form, and what becomes of it when a service is ill."""

import asyncio
import json
import os
import signal
import socket
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

from engine.config.rules.supervision import parse_quiet_hours
from engine.config.sections.supervision import NotifyConfig, Webhook
from engine.errors import ConfigError
from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter
from engine.launch.start_options import StartOptions
from engine.monitoring import notify
from engine.monitoring.channels import webhook
from engine.monitoring.channels.message import (
    Notification,
    NotificationError,
    of_alert,
    of_state,
)
from engine.monitoring.channels.webhook import FORMATS, WebhookChannel
from engine.monitoring.guardrails import Alert
from engine.monitoring.notify import (
    CHANNELS,
    Notifier,
    missing_variables,
    open_channels,
)
from engine.supervisor.processes import rank_processes
from engine.supervisor.publisher import EventPublisher
from engine.supervisor.serve import supervise
from engine.supervisor.server import Server
from engine.supervisor.supervisor import Supervisor
from tests.waiting import until

ALERT = Alert("kl_high", "notify", "KL is\n<!channel> & high", 7, {"value": float("nan")})
MESSAGE = of_alert("run", ALERT)
SECRET = "/services/T0/B0/s3cr3t"  # noqa: S105 - of no service


class Service:
    """A local server that keeps what it was sent; it may be slow or refuse."""

    def __init__(self) -> None:
        self.status, self.reply = 200, b""
        self.requests: list[tuple[str, dict, bytes]] = []
        self.released = threading.Event()
        self.released.set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.requests.append((self.path, dict(self.headers), body))
                service.released.wait(30)
                self.send_response(service.status)
                self.end_headers()
                self.wfile.write(service.reply)

            def log_message(self, *args: object) -> None:
                """Prints nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}{SECRET}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def end(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    service = Service()
    yield service
    service.end()


def channel(service, name="json", **given):
    config = Webhook(format=name, url_variable="URL", **given)
    return WebhookChannel(config, 0, {"URL": service.url, "TOKEN": "t0k3n"})


class Recorder:
    """A channel that keeps its messages, and fails where it is told to."""

    name = "recorder"

    def __init__(self, error=None, missing=()):
        self.messages, self.error, self.missing = [], error, missing

    def missing_variables(self):
        return self.missing

    async def send(self, message):
        self.messages.append(message)
        if self.error is not None:
            raise self.error


async def submitted(config, *messages, clock=None, recorder=None):
    """What a channel gets of messages."""
    recorder = recorder or Recorder()
    times = iter(clock or [])
    notifier = Notifier(config, [recorder], now=(lambda: next(times)) if clock else time.time)
    for message in messages:
        notifier.submit(message)
    await notifier.finish()
    return recorder.messages


# -- what is sent, and when ------------------------------------------------------------------------


def test_each_key_that_opens_a_channel_has_its_channel():
    filters = {"level", "quiet_hours", "max_per_hour", "sendmail"}
    assert set(CHANNELS) | filters == {f.name for f in msgspec.structs.fields(NotifyConfig)}
    assert open_channels(NotifyConfig(command="")) == []
    hooks = [Webhook(url_variable="A"), Webhook(url_variable="B")]
    config = NotifyConfig(command="true", webhooks=hooks, email=["a@example.org"])
    assert [c.name for c in open_channels(config)] == [
        "notify.command", "notify.webhooks[0] (json)", "notify.webhooks[1] (json)", "notify.email",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "reason", "kind", "level"),
    [
        ("finished", "", "end", "info"),
        ("stopped", "", "end", "info"),
        ("failed", "rank 0 died", "failure", "error"),
        ("paused", "", "pause", "info"),
        ("paused", "kl_high at step 4: KL 7 > 6", "pause", "error"),
    ],
)
def test_ends_failures_and_pauses_are_notified_by_their_urgency(state, reason, kind, level):
    message = of_state("run", state, reason, 4)
    assert (message.kind, message.level) == (kind, level)
    assert reason in message.text
    assert of_state("run", "running", "", 4) is None


def test_a_restart_is_distinguished_from_other_alerts_and_a_pausing_rule_is_urgent():
    assert of_alert("run", Alert("restart", "notify", "rank 0 died", 3)).kind == "restart"
    assert of_alert("run", Alert("non_finite", "pause", "score is NaN", 3)).level == "error"


async def test_less_than_the_level_is_not_sent_and_the_log_says_so(caplog):
    caplog.set_level("INFO")
    end, failure = of_state("run", "finished", "", 9), of_state("run", "failed", "died", 9)
    sent = await submitted(NotifyConfig(level="warning"), end, MESSAGE, failure)
    assert [m.kind for m in sent] == ["alert", "failure"]
    assert "not sent (below the level warning): run step 9: finished" in caplog.text


@pytest.mark.parametrize(
    ("hours", "time_of_day", "quiet"),
    [("22:00-07:00", 23, True), ("22:00-07:00", 6, True), ("22:00-07:00", 7, False),
     ("9:30-17:00", 10, True), ("9:30-17:00", 9, False)],
)  # fmt: skip
async def test_in_quiet_hours_only_errors_are_sent(hours, time_of_day, quiet):
    now = time.mktime((2026, 3, 2, time_of_day, 0, 0, 0, 0, -1))
    failure = of_state("run", "failed", "died", 9)
    sent = await submitted(NotifyConfig(quiet_hours=hours), MESSAGE, failure, clock=[now] * 9)
    assert [m.kind for m in sent] == (["failure"] if quiet else ["alert", "failure"])


async def test_a_clock_that_is_set_back_does_not_keep_alerts_back():
    day = 86_400.0
    sent = await submitted(NotifyConfig(max_per_hour=1), MESSAGE, MESSAGE, clock=[2 * day, day])
    assert len(sent) == 2


async def test_the_rate_limit_keeps_alerts_back_for_an_hour_and_never_the_end(caplog):
    caplog.set_level("INFO")
    end = of_state("run", "finished", "", 9)
    config = NotifyConfig(max_per_hour=2)
    sent = await submitted(config, *[MESSAGE] * 4, end, MESSAGE, clock=[0, 1, 2, 3, 3601])
    assert [(m.kind, m.unsent) for m in sent] == [
        ("alert", 0), ("alert", 0), ("end", 2), ("alert", 0),
    ]  # fmt: skip
    assert "after 2 more that were not sent" in sent[2].title
    assert caplog.text.count("dropped by the rate limit of 2 an hour") == 2


async def test_one_channel_that_fails_leaves_the_others_and_the_run_alone(caplog):
    caplog.set_level("INFO")
    bad, good = Recorder(ValueError("a mistake of ours")), Recorder()
    notifier = Notifier(NotifyConfig(), [bad, good])
    notifier.submit(MESSAGE)
    await notifier.finish()
    assert len(good.messages) == 1
    assert "recorder failed; not sent: run step 7: KL is <!channel> & high" in caplog.text
    assert "recorder sent" in caplog.text


async def test_a_failure_is_notified_although_the_journal_cannot_be_written(make_session):
    journal, recorder = JournalWriter(make_session()), Recorder()
    journal.begin_attempt(0, fresh=False)
    publisher = EventPublisher("run", journal, Server(), Notifier(NotifyConfig(), [recorder]), None)
    publisher.set_state("starting")
    journal.close()
    with pytest.raises(sqlite3.Error):
        publisher.set_state("failed", "the disk is full")
    await publisher.finish()
    assert [m.text for m in recorder.messages] == ["failed: the disk is full"]


async def test_a_pause_is_notified_unless_the_alert_that_is_its_reason_was(make_session):
    journal, recorder = JournalWriter(make_session()), Recorder()
    journal.begin_attempt(0, fresh=False)
    notifier = Notifier(NotifyConfig(max_per_hour=2), [recorder])
    publisher = EventPublisher("run", journal, Server(), notifier, None)
    publisher.set_state("starting")
    rule = Alert("kl_high", "pause", "objective/kl is 7, above 6", 3, brief="KL 7 > 6")
    reward = Alert("reward", "pause", "the reward function raised", 4)
    for alert, reason in (
        (rule, rule.cause),
        (reward, reward.text),
        (None, ""),  # a person's
        (reward, reward.text),  # beyond the rate limit
    ):
        publisher.set_state("running")
        if alert is not None:
            publisher.alert(alert)
        publisher.set_state("paused", reason)
    await publisher.finish()
    journal.close()
    assert [m.text for m in recorder.messages] == [
        "the run pauses: objective/kl is 7, above 6",
        "the run pauses: the reward function raised",
        "paused",
        "paused: the reward function raised",
    ]


async def test_an_engine_says_at_its_start_that_a_secret_is_missing(
    make_session, write_in, monkeypatch
):
    monkeypatch.delenv("NO_SUCH_HOOK", raising=False)
    writer = write_in(make_session("run", "notify.webhooks=[{url_variable: NO_SUCH_HOOK}]"))
    writer.journal.begin_attempt(0, fresh=False)
    session = writer.session
    supervisor = Supervisor(
        session, session.config(), writer.journal, session.folder / "s", StartOptions()
    )
    supervisor.state.next = None
    await supervisor.run()
    await supervisor.publisher.finish()
    with JournalReader(session) as reader:
        (alert,) = [e.payload for e in reader.events() if e.kind == "alert"]
    writer.journal.close()
    assert alert.rule == "notify"
    assert "the environment variable NO_SUCH_HOOK is not set" in alert.text


# -- over HTTP -------------------------------------------------------------------------------------


async def test_a_generic_webhook_gets_the_alert_with_its_evidence(service):
    await channel(service, token_variable="TOKEN").send(MESSAGE)  # noqa: S106 - a name
    ((path, headers, body),) = service.requests
    assert (path, headers["Authorization"]) == (SECRET, "Bearer t0k3n")
    assert json.loads(body) == {
        "rule": "kl_high", "action": "notify", "text": ALERT.text, "value": None, "session": "run",
        "step": 7, "kind": "alert", "level": "warning", "unsent": 0,
    }  # fmt: skip


async def test_chat_services_get_one_line_in_their_own_format(service):
    for name in ("slack", "discord", "ntfy"):
        await channel(service, name).send(MESSAGE)
    telegram = channel(service, "telegram", token_variable="TOKEN", chat=-100)  # noqa: S106
    await telegram.send(MESSAGE)
    slack, discord, ntfy, bot = service.requests
    text = "run step 7: KL is <!channel> & high"
    assert json.loads(slack[2]) == {"text": "run step 7: KL is &lt;!channel&gt; &amp; high"}
    assert json.loads(discord[2]) == {"content": text, "allowed_mentions": {"parse": []}}
    assert (ntfy[0], ntfy[2]) == (f"{SECRET}?title=run%3A+alert&priority=high", text.encode())
    assert (bot[0], json.loads(bot[2])) == (
        f"{SECRET}/bott0k3n/sendMessage",
        {"chat_id": -100, "text": text},
    )
    assert set(FORMATS) == {"json", "slack", "discord", "ntfy", "telegram"}


async def test_a_text_is_cut_to_what_every_service_takes(service):
    await channel(service, "discord").send(Notification("run", "alert", "info", "x" * 9000, 1))
    assert len(json.loads(service.requests[0][2])["content"]) < 2000


async def test_a_service_that_refuses_is_logged_with_its_reply_and_without_the_secret(
    service, caplog
):
    service.status, service.reply = 500, f"no hook {service.url} or {SECRET}\x1b[2J".encode()
    notifier = Notifier(NotifyConfig(), [channel(service)])
    notifier.submit(MESSAGE)
    await notifier.finish()
    assert "notify.webhooks[0] (json) failed: HTTP 500 no hook *** or ***" in caplog.text
    assert "s3cr3t" not in caplog.text
    assert "\x1b" not in caplog.text


async def test_a_service_that_is_down_is_logged(caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}{SECRET}"
        hook = WebhookChannel(Webhook(url_variable="URL"), 0, {"URL": url})
        notifier = Notifier(NotifyConfig(), [hook])
        notifier.submit(MESSAGE)
        await notifier.finish()
    assert "failed: Connection refused; not sent: run step 7" in caplog.text
    assert "s3cr3t" not in caplog.text


async def test_a_slow_service_delays_nobody_and_holds_one_thread(service, caplog, monkeypatch):
    """It replies only after the test; what it was sent is given up before."""
    monkeypatch.setattr(notify, "SEND_TIMEOUT", 0.2)
    service.released.clear()
    slow, other = channel(service), Recorder()
    notifier = Notifier(NotifyConfig(), [slow, other])
    threads = threading.active_count()
    for _ in range(3):
        notifier.submit(MESSAGE)
    assert not other.messages, "submit returns before anything is sent"
    await notifier.finish()
    assert len(other.messages) == 3
    assert caplog.text.count("failed: it took more than 0 s") == 1
    assert caplog.text.count("failed: the server still keeps an earlier message waiting") == 2
    until(lambda: service.requests, "request that the service has read")
    assert len(service.requests) == 1
    assert threading.active_count() <= threads + 2  # ours, and the server's


async def test_the_end_of_an_engine_gives_up_on_a_slow_service(service, caplog, monkeypatch):
    monkeypatch.setattr(notify, "FINISH_TIMEOUT", 0.05)
    service.released.clear()
    notifier = Notifier(NotifyConfig(), [channel(service)])
    notifier.submit(MESSAGE)
    await notifier.finish()
    assert "the engine ended before it was sent: run step 7" in caplog.text


async def test_a_signal_after_the_end_of_a_run_ends_the_wait_for_notifications(
    make_session, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(rank_processes, "rank_command", lambda *_: ["false"])
    begun = tmp_path / "begun"
    session = make_session(
        "run", "launch.max_restarts=0", f"notify.command=touch {begun}; sleep 300"
    )
    engine = asyncio.create_task(supervise(session, StartOptions()))
    async with asyncio.timeout(60):
        while not engine.done():
            if begun.exists():
                os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.01)
    assert await engine == 1
    assert "notify.command: the engine ended before it was sent: run " in caplog.text


async def test_a_redirect_is_a_failure(service):
    service.status = 302
    with pytest.raises(NotificationError, match="HTTP 302"):
        await channel(service).send(MESSAGE)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "example.org/hook"])
def test_only_http_is_spoken(url):
    assert "http://" in webhook.post(webhook.Post(url, b""))


async def test_a_variable_that_is_not_set_is_reported_at_the_start_and_with_each_message():
    hook = WebhookChannel(Webhook(url_variable="MY_HOOK"), 0, {})
    first, second = missing_variables([hook, Recorder(), Recorder(missing=["MY_TOKEN"])])
    assert "notify.webhooks[0] (json): the environment variable MY_HOOK is not set" in first
    assert "recorder: the environment variable MY_TOKEN is not set" in second
    with pytest.raises(NotificationError, match="MY_HOOK is not set"):
        await hook.send(MESSAGE)


# -- the configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["22-7", "24:00-07:00", "22:00", "07:00-07:00", "a:b-c:d"])
def test_quiet_hours_are_two_times_of_day(text):
    with pytest.raises(ConfigError, match=r"notify\.quiet_hours"):
        parse_quiet_hours(text)


@pytest.mark.parametrize(
    ("webhook_text", "message"),
    [
        ("{url_variable: 'https://hooks.example.org/s3cr3t'}", "must be the name of an environ"),
        ("{format: telegram, token_variable: '12:s3cr3t', chat: 1}", "must be the name"),
        ("{format: slack}", "needs url_variable"),
        ("{format: telegram, token_variable: T}", "needs token_variable.* and chat"),
        ("{url: 'https://hooks.example.org/s3cr3t'}", "unknown key"),
    ],
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(
    make_session, webhook_text, message
):
    with pytest.raises(ConfigError, match=message) as refused:
        make_session("run", f"notify.webhooks=[{webhook_text}]")
    assert "s3cr3t" not in str(refused.value)


def test_an_address_cannot_be_an_option_list(make_session):
    with pytest.raises(ConfigError, match="is not an e-mail address"):
        make_session("run", "notify.email=['a@example.org, b@example.org']")
