"""Rules between the keys of a configuration. The range of a single key is part of its type."""

import re
from collections.abc import Sequence
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

from engine.config.deadline import deadline
from engine.config.model_rules import check_models
from engine.config.schema import RunConfig
from engine.config.sections.reward import SOURCE_KEYS, JudgeConfig, RewardConfig, RewardSource
from engine.config.sections.supervision import RULE_CONDITIONS, NotifyConfig, Rule, Webhook
from engine.config.settings import LIVE_SETTINGS, change_settings
from engine.errors import CommandRejectedError, ConfigError
from engine.metrics import declaration


@cache
def relative_to() -> tuple[str, ...]:
    """The live settings that are numbers: `of` in a guard rail may name one of them."""
    return tuple(name for name, path in LIVE_SETTINGS.items() if _is_number(path))


def _is_number(path: str) -> bool:
    section, key = path.split(".")
    kind = get_type_hints(get_type_hints(RunConfig)[section])[key]
    return {*(get_args(kind) or (kind,))} <= {int, float, NoneType}


def check_config(config: RunConfig) -> None:
    """Checks the rules between keys.

    Raises:
        ConfigError: keys contradict each other; the message names them and a remedy.
    """
    _check_reward(config.reward)
    _check_batches(config)
    _check_objective(config)
    if config.lora.rank is None and (config.lora.alpha is not None or config.lora.targets):
        raise ConfigError(
            "lora.alpha and lora.targets need lora.rank: without a rank there are no adapters"
        )
    kl, rollout = config.kl, config.rollout
    if not kl.beta_min < kl.beta_max:
        raise ConfigError(f"kl.beta_min ({kl.beta_min}) must be below kl.beta_max ({kl.beta_max})")
    if kl.controller == "adaptive" and 0.2 * rollout.batch_size / kl.horizon >= 1:
        raise ConfigError(
            f"kl.horizon ({kl.horizon:g}) is too small for rollout.batch_size "
            f"({rollout.batch_size}): it must exceed {0.2 * rollout.batch_size:g}"
        )
    if config.train.ema.offload and config.train.ema.decay is None:
        raise ConfigError("train.ema.offload needs train.ema.decay: without it there is no average")
    deadline(config.train, {})
    for rule in config.guardrails.rules:
        check_rule(rule)
    _check_evaluation(config)
    _check_launch(config)
    _check_notify(config.notify)
    check_models(config)


def check_change(config: RunConfig, values: dict[str, Any]) -> None:
    """Checks a change of live settings against the rules between keys.

    The rules of the file hold during the run, and a change that breaks one gets the same sentence.
    A configuration that breaks one already, as an earlier version accepted it, can be changed.

    Args:
        config: in force before the change.
        values: setting → new value, of its type and in its range.

    Raises:
        CommandRejectedError: keys would contradict each other.
    """
    try:
        check_config(change_settings(config, values))
    except ConfigError as error:
        try:
            check_config(config)
        except ConfigError:
            return
        raise CommandRejectedError(str(error)) from None


def _check_objective(config: RunConfig) -> None:
    kl, ppo = config.kl, config.ppo
    if kl.place == "loss" and kl.estimator == "k1":
        raise ConfigError(
            "kl.place: loss needs kl.estimator: k2 or k3, because the gradient of k1 is zero in "
            "expectation and would not hold the policy back"
        )
    if kl.reference_update.every and config.lora.rank is not None:
        raise ConfigError(
            "kl.reference_update cannot be combined with lora.rank: the reference is the policy "
            "without its adapters"
        )
    if ppo.value_init == "reward_model":
        _check_value_init(config)


def _check_value_init(config: RunConfig) -> None:
    if not config.ppo.traits.value_function:
        raise ConfigError(
            f"ppo.value_init: reward_model needs a value function, and ppo.advantage: "
            f"{config.ppo.advantage} has none"
        )
    if config.model.value != "separate":
        raise ConfigError(
            "ppo.value_init: reward_model needs model.value: separate, because a shared value "
            "function has the policy's transformer"
        )
    if config.lora.rank is not None:
        raise ConfigError(
            "ppo.value_init: reward_model cannot be combined with lora.rank: a value function with "
            "adapters starts from the policy"
        )
    if len(config.reward.models()) != 1:
        raise ConfigError(
            "ppo.value_init: reward_model needs exactly one reward model among the reward sources, "
            f"not {len(config.reward.models())}"
        )


def _check_evaluation(config: RunConfig) -> None:
    evaluation, train = config.eval, config.train
    if evaluation.prompts is not None and evaluation.holdout:
        raise ConfigError("give one of eval.prompts and eval.holdout, not both")
    if evaluation.every and evaluation.prompts is None and not evaluation.holdout:
        raise ConfigError(
            "eval.every needs prompts to evaluate: set eval.prompts, or eval.holdout to hold some "
            "of data.prompts back from training"
        )
    for i, source in enumerate(evaluation.rewards):
        _check_source(source, f"eval.rewards[{i}]")
    metrics = {"train.best_metric": train.best_metric}
    if train.stop_at is not None:
        metrics["train.stop_at.metric"] = train.stop_at.metric
        if train.stop_at.above is None and train.stop_at.below is None:
            raise ConfigError("train.stop_at needs one of above and below")
    for key, metric in metrics.items():
        if metric.startswith("eval/") and not evaluation.every:
            raise ConfigError(f"{key} is {metric}, which needs eval.every: there is no evaluation")
        if metric.startswith("eval/ema_") and train.ema.decay is None:
            raise ConfigError(
                f"{key} is {metric}, which needs train.ema.decay: there is no average"
            )
        if declaration(metric) is None:
            raise ConfigError(
                f"{key}: there is no metric '{metric}'; docs/metrics.md lists all of them"
            )
    every = evaluation.every
    if train.best_metric.startswith("eval/") and train.save_every % every:
        raise ConfigError(
            f"train.best_metric is {train.best_metric}, so train.save_every ({train.save_every}) "
            f"must be a multiple of eval.every ({every}): each checkpoint needs its value"
        )


def _check_launch(config: RunConfig) -> None:
    launch = config.launch
    if launch.nodes > 1 and launch.rendezvous is None:
        raise ConfigError(
            f"launch.nodes: {launch.nodes} needs launch.rendezvous: HOST:PORT, at which the other "
            "machines reach this one"
        )
    if launch.fewest_nodes > launch.nodes:
        raise ConfigError(
            f"launch.min_nodes ({launch.min_nodes}) must be at most launch.nodes ({launch.nodes})"
        )
    if launch.rendezvous is not None:
        check_address(launch.rendezvous)
    if 1 <= launch.preempted_exit <= 4:
        raise ConfigError(
            f"launch.preempted_exit: {launch.preempted_exit} means something else already: give 0, "
            "or 5 to 125; 75 is customary"
        )
    per_node = launch.processes if isinstance(launch.processes, int) else 1
    if config.prompts_per_step < launch.nodes * per_node:
        raise ConfigError(
            f"{launch.nodes * per_node} ranks need at least as many prompts per step, not "
            f"{config.prompts_per_step}: raise rollout.batch_size"
        )


def _check_notify(notify: NotifyConfig) -> None:
    if notify.quiet_hours is not None:
        parse_quiet_hours(notify.quiet_hours)
    for address in notify.email:
        if "@" not in address or not address.isprintable() or set(address) & set(" ,<>"):
            raise ConfigError(f"notify.email: '{address}' is not an e-mail address")
    for i, webhook in enumerate(notify.webhooks):
        _check_webhook(webhook, f"notify.webhooks[{i}]")


def _check_webhook(webhook: Webhook, where: str) -> None:
    for key in ("url_variable", "token_variable"):
        name = getattr(webhook, key)
        if name is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            # The value is not repeated: it may be the secret itself.
            raise ConfigError(
                f"{where}.{key} must be the name of an environment variable: export the secret "
                "under a name such as ALERT_URL and give the name"
            )
    if webhook.format != "telegram":
        if webhook.url_variable is None:
            raise ConfigError(
                f"{where} needs url_variable, the environment variable that holds its URL"
            )
    elif webhook.token_variable is None or webhook.chat is None:
        raise ConfigError(
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


def check_address(text: str) -> tuple[str, int]:
    """Splits `HOST:PORT` into host and port. Raises ConfigError for any other text."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"'{text}' is not an address: write HOST:PORT, such as 10.0.0.1:29400")
    return host, int(port)


def check_rule(rule: Rule) -> None:
    """Checks that a guard rail has a condition. Raises ConfigError."""
    where = f"guardrails.rules '{rule.name}'"
    if rule.metric != "*" and all(getattr(rule, key) is None for key in RULE_CONDITIONS):
        raise ConfigError(f"{where} needs one of {', '.join(RULE_CONDITIONS)}")
    if rule.lasts > rule.window + 1:
        raise ConfigError(
            f"{where}.lasts must be at most its window + 1, which is {rule.window + 1} "
            f"(it is {rule.lasts})"
        )
    if rule.of is not None and rule.of not in relative_to():
        known = ", ".join(relative_to())
        raise ConfigError(f"{where}.of must be one of {known} (it is '{rule.of}')")


def _check_reward(reward: RewardConfig) -> None:
    keys = [f"reward.{key}" for key in (*SOURCE_KEYS, "mix")]
    given = [key for key in keys if getattr(reward, key.removeprefix("reward."))]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ConfigError(f"give exactly one of {_listed(keys)} (given: {found})")
    if reward.mix:
        defaults = RewardConfig()
        for key in SOURCE_OPTIONS:
            if getattr(reward, key) != getattr(defaults, key):
                raise ConfigError(f"reward.{key} belongs to a source: move it into reward.mix")
    for i, source in enumerate(reward.sources()):
        _check_source(source, f"reward.mix[{i}]" if reward.mix else "reward")
    if all(source.weight == 0 for source in reward.sources()):
        raise ConfigError("reward.mix needs a source whose weight is not 0")


def _check_source(source: RewardSource, where: str) -> None:
    if len(source.keys_given) != 1:
        raise ConfigError(f"{where} needs exactly one of {_listed(SOURCE_KEYS)}")
    if source.function is not None and not _names_a_function(source.function):
        raise ConfigError(
            f"{where}.function must be written module:function, not '{source.function}'"
        )
    for key in ("service", "judge"):
        if (url := getattr(source, key)) is not None:
            check_url(url, f"{where}.{key}")
    _check_source_options(source, where)
    if source.judge is not None:
        _check_judging(source.judging, f"{where}.judging")


SOURCE_OPTIONS = {
    "revision": ("model",),
    "trust_remote_code": ("model",),
    "pair": ("model",),
    "protocol": ("service",),
    "judging": ("judge",),
    "http": ("service", "judge"),
}
"""Option of a reward source → the sources that it is for."""


def _check_source_options(source: RewardSource, where: str) -> None:
    defaults = RewardSource()
    for key, kinds in SOURCE_OPTIONS.items():
        if getattr(source, key) != getattr(defaults, key) and source.kind not in kinds:
            needed = " or ".join(f"{where}.{kind}" for kind in kinds)
            raise ConfigError(f"{where}.{key} needs {needed}")
    if source.http.label_column is not None and source.protocol != "openrlhf":
        raise ConfigError(f"{where}.http.label_column needs {where}.protocol: openrlhf")
    name = source.http.token_env
    if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        # The value is not repeated: it may be a token.
        raise ConfigError(
            f"{where}.http.token_env must be the name of an environment variable, such as "
            "REWARD_TOKEN, not the token"
        )


def _check_judging(judging: JudgeConfig, where: str) -> None:
    if judging.model is None:
        raise ConfigError(f"{where}.model is missing: name a model of the judge's endpoint")
    if judging.template is not None and "{response}" not in judging.template:
        raise ConfigError(f"{where}.template must contain {{response}}, where the response belongs")
    if judging.parse is not None:
        try:
            groups = re.compile(judging.parse).groups
        except re.error as error:
            raise ConfigError(f"{where}.parse is not a regular expression: {error}") from None
        if not groups:
            raise ConfigError(f"{where}.parse needs a group, such as 'Score: (\\d+)'")
    if judging.scale is not None and not judging.scale[0] < judging.scale[1]:
        low, high = judging.scale
        raise ConfigError(f"{where}.scale must rise: {low:g} is not below {high:g}")
    if taken := {"model", "messages", "stream", "n"} & (judging.options or {}).keys():
        raise ConfigError(f"{where}.options cannot contain {min(taken)}")


def check_url(url: str, key: str) -> None:
    """Checks that requests can be sent to a URL. Raises ConfigError."""
    if "@" in url.partition("?")[0]:
        # The value is not repeated: it holds a password.
        raise ConfigError(
            f"{key} must not contain a user or a password, which would be stored: use "
            "http.token_env for a token"
        )
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        whole = False
    if not whole or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise ConfigError(f"{key} must be a URL such as http://127.0.0.1:5000/score, not '{url}'")


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(names[:-1]) + f" and {names[-1]}"


def _names_a_function(text: str) -> bool:
    module, _, function = text.partition(":")
    return all(part.isidentifier() for part in module.split(".")) and function.isidentifier()


def _check_batches(config: RunConfig) -> None:
    batch, per_prompt = config.rollout.batch_size, config.responses_per_prompt
    traits = config.ppo.traits
    if per_prompt < traits.least_per_prompt:
        raise ConfigError(
            f"rollout.per_prompt must be at least {traits.least_per_prompt} for "
            f"ppo.advantage: {config.ppo.advantage}"
        )
    if batch % per_prompt:
        raise ConfigError(
            f"rollout.batch_size ({batch}) must be a multiple of rollout.per_prompt ({per_prompt})"
        )
    if batch % config.ppo.minibatches:
        raise ConfigError(
            f"rollout.batch_size ({batch}) must be a multiple of "
            f"ppo.minibatches ({config.ppo.minibatches})"
        )
    if config.rollout.dynamic and per_prompt < 2:
        raise ConfigError(
            "rollout.dynamic needs a rollout.per_prompt of at least 2: one response has no variance"
        )
    if config.reward.overlong.buffer > config.rollout.max_new_tokens:
        raise ConfigError(
            f"reward.overlong.buffer ({config.reward.overlong.buffer}) may be "
            f"rollout.max_new_tokens ({config.rollout.max_new_tokens}) at most"
        )
    if batch < 2 and traits.baseline and config.ppo.baseline == "batch":
        raise ConfigError("ppo.baseline: batch needs a rollout.batch_size of at least 2")
