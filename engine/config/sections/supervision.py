"""The sections `log`, `guardrails` and `notify`: what is recorded, watched and sent."""

from typing import Annotated, Literal

from msgspec import Meta

from engine.config.sections.base import (
    Count,
    NonNegative,
    Positive,
    Program,
    Seconds,
    Section,
    Whole,
)


class LogConfig(Section, frozen=True):
    """What is recorded of each step."""

    samples: Whole = 16
    """Responses recorded per step."""
    arrays: Whole = 4
    """How many of these are recorded with per-token arrays; fewer if they have over 600,000
    tokens."""
    tensorboard: bool = True
    """Write TensorBoard event files to the session's `tb/`."""
    trackers: list[str] = []
    """Experiment trackers that get the metrics of each step, by accelerate: `wandb`, `trackio`,
    `mlflow`, `comet_ml`, `aim`, `clearml`, `dvclive`, `swanlab`, `tensorboard`, or `module:Class`
    for one of your own (docs/trackers.md)."""
    project: str = "rlhf-tui"
    """The trackers' project; the run has the name of the session."""


class Rule(Section, frozen=True):
    """One guard rail: a condition on a metric, and the action when it is met.

    It raises an alert when the condition begins to hold, again each time the metric is twice as far
    beyond its limit as at the last alert, and again when the condition returns after `clears_after`
    steps without it.
    """

    name: str
    """Name of the alert."""
    metric: str
    """Name of the metric; `*` matches every metric that is not finite."""
    above: float | None = None
    """Raises an alert when the metric is above this."""
    below: float | None = None
    """Raises an alert when the metric is below this."""
    of: str | None = None
    """A setting such as `target` or `max_new_tokens`, of which `above`, `below` and
    `predicted_above` are multiples."""
    predicted_above: float | None = None
    """Raises an alert while the metric is not above this yet, but rises steadily and will be above
    it in 10 steps, according to a straight line through the last `window` steps (at least 4)."""
    rises: Positive | None = None
    """Raises an alert when the metric exceeds the mean of the last `window` steps by this fraction
    of it."""
    falls: Positive | None = None
    """Raises an alert when the metric is below the mean of the last `window` steps by this fraction
    of it."""
    window: Count = 20
    """Number of steps in the mean that `rises` and `falls` compare with, or of first steps in the
    median that `drifts_up` and `drifts_down` compare with, or in the line of `predicted_above`."""
    lasts: Count = 1
    """Number of consecutive steps on which `above` or `below` must hold; at most `window` + 1."""
    clears_after: Count | None = None
    """Number of consecutive steps on which the condition must not hold before the rule can
    raise another alert, so that a metric that oscillates around its limit raises only one. Default:
    20 with `notify`; 1 with another action, which is carried out whenever the condition begins to
    hold."""
    drifts_up: Positive | None = None
    """Raises an alert when a sequential test (CUSUM) finds that the metric stays above the median
    of the run's first `window` steps by more than this fraction of it."""
    drifts_down: Positive | None = None
    """The same for a metric that stays below that median."""
    diverges: Positive | None = None
    """Raises an alert when the metric rises while the score of a judge that the run is not trained
    on falls, both by this many times their usual change: held-out evaluation, sources of weight
    0."""
    advice: str = ""
    """One line for the operator, shown with the alert."""
    action: Literal["notify", "checkpoint", "pause", "stop"] = "notify"
    """Action in addition to the alert; `notify` is the alert alone."""


RULE_CONDITIONS = (
    "above", "below", "predicted_above", "falls", "rises", "drifts_up", "drifts_down", "diverges",
)  # fmt: skip
"""The keys of a rule that are conditions; :mod:`engine.monitoring.conditions` evaluates them."""


class GuardrailConfig(Section, frozen=True):
    """Guard rails: rules over metrics and over the machine that raise alerts."""

    defaults: bool = True
    """Use the built-in rules; a rule of the same name in `rules` replaces a built-in one."""
    rules: list[Rule] = []
    """Additional rules."""
    silent_rank: Seconds = 300.0
    """Seconds without a message from a rank before an alert."""
    disk_free_gb: NonNegative = 2.0
    """Free disk space, in gigabytes, below which there is an alert."""


class Webhook(Section, frozen=True):
    """A service that is sent each message over HTTP.

    Its URL and its token are secrets: they are read from environment variables of the engine, and
    are in no file.
    """

    format: Literal["json", "slack", "discord", "ntfy", "telegram"] = "json"
    """Format of the messages. `json` is what `notify.command` gets, including the responses that
    are an alert's evidence; the others get one line of text. `slack` also works for Mattermost."""
    url_variable: str | None = None
    """Name of the environment variable with the URL; for `telegram` only for a server of your
    own."""
    token_variable: str | None = None
    """Name of the environment variable with a token: of the bot for `telegram`, otherwise one that
    is sent as `Authorization: Bearer`."""
    chat: str | Annotated[int, Meta(ge=-1_000_000_000_000_000, le=1_000_000_000_000_000)] | None = (
        None
    )
    """`telegram`: id of the chat, or `@` and the name of the channel."""


class NotifyConfig(Section, frozen=True):
    """Where alerts, restarts, pauses, failures and the end of the run are sent.

    `rlhf-tui notify test NAME` sends a test message. The log says what became of each message.
    """

    command: str | None = None
    """A shell command that is run for each message and gets it as JSON on standard input."""
    webhooks: list[Webhook] = []
    """Services that are sent each message over HTTP."""
    email: list[str] = []
    """Addresses that get each message by the machine's sendmail."""
    sendmail: Program | None = None
    """Program that sends the e-mail. Default: `sendmail`."""
    level: Literal["info", "warning", "error"] = "info"
    """Lowest level that is sent. `error`: failures, and guard rails that pause or stop; `warning`:
    also other alerts and restarts; `info`: also the end of the run, and pauses that a person asked
    for."""
    quiet_hours: str | None = None
    """`HH:MM-HH:MM`, local time: then only the level `error` is sent."""
    max_per_hour: Annotated[int, Meta(ge=1, le=3600)] = 30
    """Maximum number of alerts per hour; the next message says how many more were not sent."""
