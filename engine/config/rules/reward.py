"""Rules of the section `reward`, and of the reward sources in other sections."""

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from engine.config.sections.reward import SOURCE_KEYS, JudgeConfig, RewardConfig, RewardSource
from engine.errors import ConfigError


def check_reward(reward: RewardConfig) -> None:
    """Checks the reward sources. Raises ConfigError."""
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
        check_source(source, f"reward.mix[{i}]" if reward.mix else "reward")
    if all(source.weight == 0 for source in reward.sources()):
        raise ConfigError("reward.mix needs a source whose weight is not 0")


def check_source(source: RewardSource, where: str) -> None:
    """Checks one source; `where` is its place in the configuration. Raises ConfigError."""
    if len(source.keys_given) != 1:
        raise ConfigError(f"{where} needs exactly one of {_listed(SOURCE_KEYS)}")
    if source.function is not None and not names_a_function(source.function):
        raise ConfigError(
            f"{where}.function must be written module:function, not '{source.function}'"
        )
    if source.environment is not None and not source.environment.isidentifier():
        raise ConfigError(
            f"{where}.environment must be the name of a method, not '{source.environment}'"
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
    if name is not None and not names_a_variable(name):
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


def names_a_function(text: str) -> bool:
    """Whether a text is written `module:name`."""
    module, _, function = text.partition(":")
    return all(part.isidentifier() for part in module.split(".")) and function.isidentifier()


def names_a_variable(text: str) -> bool:
    """Whether a text can be the name of an environment variable."""
    return text.isascii() and text.isidentifier()
