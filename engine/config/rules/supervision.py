"""Rules of the sections `guardrails` and `notify`."""

import re
from collections.abc import Iterator
from functools import cache
from types import NoneType
from typing import get_args, get_type_hints

from engine.config.mistakes import mistakes_of
from engine.config.rules.evaluation import metric_mistakes
from engine.config.rules.reward import names_a_variable
from engine.config.schema import RunConfig
from engine.config.sections.supervision import (
    RULE_CONDITIONS,
    GuardrailConfig,
    NotifyConfig,
    Rule,
    Webhook,
)
from engine.config.settings import LIVE_SETTINGS
from engine.errors import ConfigError

MIN_IN_LINE = 4
"""Steps below which a line through them says next to nothing of its slope's error."""


@cache
def relative_to() -> tuple[str, ...]:
    """The live settings that are numbers: `of` in a guard rail may name one of them."""
    return tuple(name for name, path in LIVE_SETTINGS.items() if _is_number(path))


def _is_number(path: str) -> bool:
    section, key = path.split(".")
    kind = get_type_hints(get_type_hints(RunConfig)[section])[key]
    return {*(get_args(kind) or (kind,))} <= {int, float, NoneType}


def notify_mistakes(notify: NotifyConfig) -> Iterator[str]:
    """The mistakes in the channels and quiet hours."""
    if notify.quiet_hours is not None:
        yield from mistakes_of(parse_quiet_hours, notify.quiet_hours)
    for address in notify.email:
        if "@" not in address or not address.isprintable() or set(address) & set(" ,<>"):
            yield f"notify.email: '{address}' is not an e-mail address"
    for i, webhook in enumerate(notify.webhooks):
        yield from _webhook_mistakes(webhook, f"notify.webhooks[{i}]")


def _webhook_mistakes(webhook: Webhook, where: str) -> Iterator[str]:
    for key in ("url_variable", "token_variable"):
        name = getattr(webhook, key)
        if name is not None and not names_a_variable(name):
            # The value is not repeated: it may be the secret itself.
            yield (
                f"{where}.{key} must be the name of an environment variable: export the secret "
                "under a name such as ALERT_URL and give the name"
            )
    if webhook.format != "telegram":
        if webhook.url_variable is None:
            yield (f"{where} needs url_variable, the environment variable that holds its URL")
    elif webhook.token_variable is None or webhook.chat is None:
        yield (
            f"{where} needs token_variable, the environment variable that holds the bot's token, "
            "and chat, the id of the chat"
        )


def parse_quiet_hours(text: str) -> tuple[int, int]:
    """`22:00-07:30` as minutes after midnight, (1320, 450). Raises ConfigError for other texts."""
    time = r"([01]?\d|2[0-3]):([0-5]\d)"
    match = re.fullmatch(rf"\s*{time}\s*[-–]\s*{time}\s*", text, re.ASCII)
    if match is None:
        raise ConfigError(
            f"notify.quiet_hours must be HH:MM-HH:MM, such as 22:00-07:00, not '{text}'"
        )
    first, last = (60 * int(match[i]) + int(match[i + 1]) for i in (1, 3))
    if first == last:
        raise ConfigError(f"notify.quiet_hours: {text} begins and ends at the same time")
    return first, last


def guardrail_mistakes(guardrails: GuardrailConfig) -> Iterator[str]:
    """The mistakes in guard rails: each has its own name and a metric that there is.

    Otherwise one would never raise an alert, which nothing would show.
    """
    names: set[str] = set()
    for rule in guardrails.rules:
        yield from rule_mistakes(rule)
        where = f"guardrails.rules '{rule.name}'"
        if rule.name in names:
            yield f"{where} is there twice, and only the last would count: rename one"
        names.add(rule.name)
        if rule.metric != "*":
            yield from metric_mistakes(where, rule.metric)


def rule_mistakes(rule: Rule) -> Iterator[str]:
    """The mistakes in the conditions of a guard rail."""
    where = f"guardrails.rules '{rule.name}'"
    if rule.metric != "*" and all(getattr(rule, key) is None for key in RULE_CONDITIONS):
        yield f"{where} needs one of {', '.join(RULE_CONDITIONS)}"
    if rule.lasts > rule.window + 1:
        yield (
            f"{where}.lasts must be at most its window + 1, which is {rule.window + 1}, "
            f"not {rule.lasts}"
        )
    if rule.predicted_above is not None and rule.window < MIN_IN_LINE:
        yield (
            f"{where}.window must be at least {MIN_IN_LINE} with predicted_above, not {rule.window}"
        )
    if rule.of is not None and rule.of not in relative_to():
        known = ", ".join(relative_to())
        yield f"{where}.of must be one of {known}, not '{rule.of}'"
