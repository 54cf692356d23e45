"""Reads, completes, compares and writes configurations.

The keys are declared in :mod:`engine.config.schema`; this module turns files and ``-o key=value``
overrides into one, and a bad line into one clear sentence.
"""

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from engine.config.rules import check_config
from engine.config.schema import FIXED_AT_START, RunConfig
from engine.config.type_errors import expected, shown
from engine.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-5 is a number here too (YAML 1.1 makes it text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document. Raises ConfigError, naming `where`, when it is none."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (ValueError, RecursionError) as error:  # a date such as 2020-13-45; a thousand brackets
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not a YAML document"
        raise ConfigError(f"{where}{line}: {problem}") from error


def load(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a file, with overrides on top; relative paths start at its folder.

    Raises:
        ConfigError: the file is missing or anything in it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as model:, data: and reward:")
    apply_overrides(tree, overrides)
    _anchor_paths(tree, path.resolve().parent)
    return from_tree(tree)


def from_tree(tree: dict[str, Any]) -> RunConfig:
    """Decodes, completes and checks. Raises ConfigError."""
    _check_finite(tree)
    try:
        config = msgspec.convert(tree, RunConfig, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), tree)) from None
    config = complete(config)
    check_config(config)
    return config


def _check_finite(value: Any, path: str = "") -> None:
    """Infinity is above every lower bound, and no run can be made of it. Raises ConfigError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number (it is {value})")
    if isinstance(value, dict):
        for key, child in value.items():
            _check_finite(child, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            _check_finite(child, f"{path}[{i}]")


def complete(config: RunConfig) -> RunConfig:
    """Fills in the defaults that depend on other keys."""
    rollout, ppo, traits = config.rollout, config.ppo, config.ppo.traits
    if rollout.per_prompt is None:
        rollout = msgspec.structs.replace(rollout, per_prompt=traits.per_prompt)
    if ppo.whiten is None:
        ppo = msgspec.structs.replace(ppo, whiten=traits.whiten)
    lora = config.lora
    if ppo.value_head_rate is None:
        ppo = msgspec.structs.replace(ppo, value_head_rate=10.0 if lora.rank is None else 1.0)
    if lora.rank is not None and lora.alpha is None:
        lora = msgspec.structs.replace(lora, alpha=2 * lora.rank)
    return msgspec.structs.replace(config, rollout=rollout, ppo=ppo, lora=lora)


def override(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The same configuration with `key=value` pairs changed. Raises ConfigError."""
    tree = to_tree(config)
    apply_overrides(tree, overrides)
    _anchor_paths(tree, Path.cwd())
    return from_tree(tree)


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Writes `a.b=value` pairs into a tree of sections, values read as YAML."""
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"-o takes key=value, not '{item}'")
        *sections, last = key.strip().split(".")
        node = tree
        for section in sections:
            child = node.setdefault(section, {})
            if not isinstance(child, dict):
                raise ConfigError(f"unknown key '{key}'{_nearest(key)}")
            node = child
        node[last] = parse_yaml(value, f"-o {key}")


def to_tree(config: RunConfig) -> dict[str, Any]:
    """Plain dictionaries, as YAML writes them."""
    tree = msgspec.to_builtins(config)
    if not isinstance(tree, dict):
        raise TypeError("a configuration is a mapping")
    return tree


def as_mapping(value: msgspec.Struct) -> dict[str, Any]:
    """A struct's own fields as plain values, its tag left out."""
    mapping: dict[str, Any] = msgspec.to_builtins(msgspec.structs.asdict(value))
    return mapping


def dump(config: RunConfig) -> str:
    """The configuration as YAML text, every key stated."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"kl": {"beta": 1}}` as `{"kl.beta": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ: `{key: (old, new)}`."""
    before, after = flatten(to_tree(old)), flatten(to_tree(new))
    keys = sorted(before.keys() | after.keys())
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def check_resumable(old: RunConfig, new: RunConfig) -> None:
    """Refuses, on a resume, what would change the model or the data's order."""
    for key in changes(old, new):
        if key.startswith(FIXED_AT_START):
            # A checkpoint holds the adapters, or none: no fork can go on with others.
            instead = "" if key.startswith("lora.") else ", or fork instead"
            raise ConfigError(
                f"{key} cannot change on a resume, it decides the model or the data's order: "
                f"start a run of its own with it{instead}"
            )


def check_forkable(old: RunConfig, new: RunConfig) -> None:
    """Refuses, on a fork, what a checkpoint of the old run cannot go on with."""
    for key in changes(old, new):
        if key.startswith("lora."):
            raise ConfigError(
                f"{key} cannot change on a fork, the checkpoint holds what it decided: "
                "export the policy with --merged and start a run from that"
            )


def known_keys() -> list[str]:
    """Every dotted key a configuration can have."""
    return list(_keys_of(RunConfig, ""))


def _keys_of(section: type[msgspec.Struct], prefix: str) -> Iterable[str]:
    for field in msgspec.structs.fields(section):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _keys_of(field.type, f"{prefix}{field.encode_name}.")
        else:
            yield prefix + field.encode_name


def _nearest(key: str) -> str:
    """`, did you mean 'ppo.epochs'?`, or what the section holds."""
    keys = known_keys()
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not close:
        last = key.rsplit(".", 1)[-1]
        close = [k for k in keys if k.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean '{close[0]}'?" if close else ""


def _explain(message: str, tree: dict[str, Any]) -> str:
    """Msgspec's words for a wrong value, as one sentence about a dotted key."""
    text, _, at = message.partition(" - at `$")
    path = at.rstrip("`").lstrip(".").replace("...", "mix")
    if match := re.search(r"unknown field `(.+)`", text):
        key = f"{path}.{match[1]}" if path else match[1]
        return f"unknown key '{key}'{_nearest(key)}"
    if match := re.search(r"missing required field `(.+)`", text):
        key = f"{path}.{match[1]}" if path else match[1]
        hint = " (a section)" if key in ("model", "data", "reward") else ""
        return f"'{key}' is missing{hint}: it has no default"
    wanted = expected(text)
    value = flatten(tree).get(path, _lookup(tree, path))
    choices = _choices(path)
    if choices and ("enum" in text or not wanted):
        wanted = "one of " + ", ".join(choices)
    return f"{path} must be {wanted} (it is {shown(value)})"


def _lookup(tree: Any, path: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", path):
        try:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return tree


def _choices(path: str) -> list[str]:
    """The allowed words of a key, where it takes only some."""
    found: Any = msgspec.inspect.type_info(RunConfig)
    for part in path.split("."):
        fields = getattr(found, "fields", ())
        found = next((f.type for f in fields if f.encode_name == part), None)
    kinds = [found, *getattr(found, "types", ())]
    words = [str(v) for kind in kinds for v in getattr(kind, "values", ())]
    numbers = any(isinstance(kind, msgspec.inspect.IntType) for kind in kinds)
    return [*(["a whole number"] if words and numbers else []), *words]


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    """Makes relative paths absolute where something lies there; a hub id stays as it is."""

    def anchored(value: Any) -> Any:
        if not isinstance(value, str) or value.startswith("starter:"):
            return value
        try:
            path = folder / Path(value).expanduser()
        except RuntimeError:  # ~nobody
            return value
        looks_local = (
            value.startswith((".", "~", "/")) or path.exists() or path.suffix in DATA_FILES
        )
        return str(path.resolve()) if looks_local else value

    for section, keys in PATH_KEYS.items():
        node = tree.get(section)
        for key in keys:
            if isinstance(node, dict) and key in node:
                node[key] = anchored(node[key])
    reward = tree.get("reward")
    if not isinstance(reward, dict):
        return
    mix = reward.get("mix")
    sources = [s for s in mix if isinstance(s, dict)] if isinstance(mix, list) else []
    for source in sources:
        if "model" in source:
            source["model"] = anchored(source["model"])
    if reward.get("path") is None and any(s.get("function") for s in [reward, *sources]):
        reward["path"] = str(folder)


DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File endings of prompt files, and what `datasets` calls each format."""
PATH_KEYS = {"data": ["prompts"], "model": ["policy", "reference"], "reward": ["model", "path"]}
