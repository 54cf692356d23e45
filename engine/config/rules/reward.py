"""Rules of the section `reward`, and of the reward sources in other sections."""

import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from engine.config.sections.reward import SOURCE_KEYS, JudgeConfig, RewardConfig, RewardSource


def reward_mistakes(reward: RewardConfig) -> Iterator[str]:
    """The mistakes in the reward sources."""
    keys = [f"reward.{key}" for key in (*SOURCE_KEYS, "mix")]
    given = [key for key in keys if getattr(reward, key.removeprefix("reward."))]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        yield f"give exactly one of {_listed(keys)} (given: {found})"
        return
    if reward.mix:
        defaults = RewardConfig()
        for key in SOURCE_OPTIONS:
            if getattr(reward, key) != getattr(defaults, key):
                yield f"reward.{key} belongs to a source: move it into reward.mix"
    for i, source in enumerate(reward.sources()):
        yield from source_mistakes(source, f"reward.mix[{i}]" if reward.mix else "reward")
    if all(source.weight == 0 for source in reward.sources()):
        yield "reward.mix needs a source whose weight is not 0"


def source_mistakes(source: RewardSource, where: str) -> Iterator[str]:
    """The mistakes in one source; `where` is its place in the configuration."""
    if len(source.keys_given) != 1:
        yield f"{where} needs exactly one of {_listed(SOURCE_KEYS)}"
        return
    if source.function is not None and not names_a_function(source.function):
        yield (f"{where}.function must be written module:function, not '{source.function}'")
    if source.environment is not None and not source.environment.isidentifier():
        yield (f"{where}.environment must be the name of a method, not '{source.environment}'")
    for key in ("service", "judge"):
        if (url := getattr(source, key)) is not None:
            yield from url_mistakes(url, f"{where}.{key}")
    yield from _option_mistakes(source, where)
    if source.judge is not None:
        yield from _judging_mistakes(source.judging, f"{where}.judging")


SOURCE_OPTIONS = {
    "revision": ("model",),
    "trust_remote_code": ("model",),
    "pair": ("model",),
    "protocol": ("service",),
    "judging": ("judge",),
    "http": ("service", "judge"),
}
"""Option of a reward source → the sources that it is for."""


def _option_mistakes(source: RewardSource, where: str) -> Iterator[str]:
    defaults = RewardSource()
    for key, kinds in SOURCE_OPTIONS.items():
        if getattr(source, key) != getattr(defaults, key) and source.kind not in kinds:
            needed = " or ".join(f"{where}.{kind}" for kind in kinds)
            yield f"{where}.{key} needs {needed}"
    asks = source.kind in SOURCE_OPTIONS["http"]
    if asks and source.http.label_column is not None and source.protocol != "openrlhf":
        yield f"{where}.http.label_column needs {where}.protocol: openrlhf"
    name = source.http.token_env
    if name is not None and not names_a_variable(name):
        # The value is not repeated: it may be a token.
        yield (
            f"{where}.http.token_env must be the name of an environment variable, such as "
            "REWARD_TOKEN, not the token"
        )


def _judging_mistakes(judging: JudgeConfig, where: str) -> Iterator[str]:
    if judging.model is None:
        yield f"{where}.model is missing: name a model of the judge's endpoint"
    if judging.template is not None and "{response}" not in judging.template:
        yield f"{where}.template must contain {{response}}, where the response belongs"
    if judging.parse is not None:
        try:
            groups = re.compile(judging.parse).groups
        except re.error as error:
            yield f"{where}.parse is not a regular expression: {error}"
        else:
            if not groups:
                yield f"{where}.parse needs a group, such as 'Score: (\\d+)'"
    if judging.scale is not None and not judging.scale[0] < judging.scale[1]:
        low, high = judging.scale
        yield f"{where}.scale must rise: {low:g} is not below {high:g}"
    if taken := {"model", "messages", "stream", "n"} & (judging.options or {}).keys():
        yield f"{where}.options cannot contain {min(taken)}"


def url_mistakes(url: str, key: str) -> Iterator[str]:
    """A mistake if requests cannot be sent to a URL."""
    if "@" in url.partition("?")[0]:
        # The value is not repeated: it holds a password.
        yield (
            f"{key} must not contain a user or a password, which would be stored: use "
            "http.token_env for a token"
        )
        return
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        whole = False
    if not whole or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        yield f"{key} must be a URL such as http://127.0.0.1:5000/score, not '{url}'"


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
