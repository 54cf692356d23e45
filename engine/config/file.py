"""Reads, completes, compares and writes configurations.

The keys are declared in :mod:`engine.config.sections`. This module turns a file and `-o key=value`
overrides into a configuration; :mod:`engine.config.key_errors` puts mistakes into words.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.config.key_errors import explain, nearest
from engine.config.paths import make_paths_absolute
from engine.config.rules.run_config import check_config
from engine.config.schema import RunConfig, is_fixed_at_start
from engine.config.sections.model import RSLORA_ALPHA
from engine.config.sections.ppo import DEFAULT_LAM, FITTED_VALUE_LAM
from engine.config.session_file import enclose, read_session_text, read_text
from engine.config.yaml_document import check_plain, dump_yaml, parse_yaml
from engine.errors import ConfigError
from engine.examined import examined

VALUES_OF_OLD_SESSIONS = {"rollout.sampling": "inverse_cdf"}
"""Values for sessions that began before a key existed, if they differ from the key's default."""
DEPENDENT_DEFAULTS: dict[str, Callable[[RunConfig], Any]] = {
    "rollout.per_prompt": lambda c: c.ppo.traits.per_prompt,
    "eval.column": lambda c: c.data.column,
    "eval.temperature": lambda _: 1.0,
    "eval.max_new_tokens": lambda c: c.rollout.max_new_tokens,
    "ppo.whiten": lambda c: c.ppo.traits.whiten,
    "ppo.lam": lambda c: FITTED_VALUE_LAM if c.linear_value else DEFAULT_LAM,
    "ppo.lam_value": lambda c: DEFAULT_LAM if c.linear_value and c.ppo.lam is None else None,
    "ppo.value_head_rate": lambda c: (
        c.ppo.value_rate
        if c.ppo.value_init == "reward_model"
        else 10.0
        if c.lora.rank is None
        else 1.0
    ),
    "lora.alpha": lambda c: (
        None if c.lora.rank is None else RSLORA_ALPHA if c.lora.rslora else 2 * c.lora.rank
    ),
}
"""A key that :func:`complete` fills in if it is left out → its value for a configuration."""


def load(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Loads a configuration from a YAML file.

    Args:
        path: the file; relative paths in it start at its folder.
        overrides: `key=value` pairs, applied on top of the file.

    Raises:
        ConfigError: the file cannot be read, or a key or a value is wrong.
    """
    tree = _parse(read_text(path), path)
    apply_overrides(tree, overrides)
    return _from_file(tree, path)


def load_session(path: Path) -> RunConfig:
    """Loads the config.yaml of a session, which has every key that existed when it began.

    Raises:
        ConfigError: the file cannot be read or is cut off, or a key or a value is wrong.
    """
    tree = _parse(read_session_text(path), path)
    for key, value in VALUES_OF_OLD_SESSIONS.items():
        section, _, name = key.partition(".")
        if isinstance(keys := tree.get(section), dict):
            keys.setdefault(name, value)
    return _from_file(tree, path)


def from_mapping(tree: Mapping[str, Any], folder: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Like :func:`load`, for the content of a file as nested mappings.

    Args:
        tree: nested mappings; unchanged.
        folder: where relative paths start.
        overrides: `key=value` pairs, applied on top.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    check_plain(dict(tree))
    own = copy.deepcopy(dict(tree))
    apply_overrides(own, overrides)
    make_paths_absolute(own, folder)
    return from_tree(own)


def _from_file(tree: dict[str, Any], path: Path) -> RunConfig:
    make_paths_absolute(tree, path.resolve().parent)
    return from_tree(tree)


def _parse(text: str, path: Path) -> dict[str, Any]:
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must contain sections such as model:, data: and reward:")
    return tree


def from_tree(tree: dict[str, Any]) -> RunConfig:
    """Decodes nested dictionaries, fills in defaults and checks the rules. Raises ConfigError."""
    check_plain(tree)
    try:
        config = msgspec.convert(tree, examined(RunConfig), strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(explain(str(error), tree)) from None
    config = complete(config)
    check_config(config)
    return config


def complete(config: RunConfig) -> RunConfig:
    """Fills in the defaults that depend on other keys, see :data:`DEPENDENT_DEFAULTS`."""
    sections: dict[str, Any] = {}
    for key, default in DEPENDENT_DEFAULTS.items():
        name, _, field = key.partition(".")
        section = sections.get(name, getattr(config, name))
        if getattr(section, field) is None:
            sections[name] = msgspec.structs.replace(section, **{field: default(config)})
    return msgspec.structs.replace(config, **sections)


def override(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Applies `key=value` pairs to a configuration.

    Relative paths in the values start at the current folder.

    Raises:
        ConfigError: a pair or the resulting configuration is wrong.
    """
    given = list(overrides)
    tree = to_tree(config)
    apply_overrides(tree, given)
    # Other keys stay as they are: the id of a model on the hub may be the name of a folder here.
    changed = _overridden(tree, given)
    make_paths_absolute(changed, Path.cwd())
    for section, keys in changed.items():
        tree[section] |= keys
    return from_tree(tree)


def _overridden(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The keys of sections of `tree` that overrides name, by section; also folders of modules."""
    found = {
        name: {"path": tree[name].get("path")}
        for name in ("reward", "environment")
        if isinstance(tree[name], dict)
    }
    for item in overrides:
        section, _, key = item.partition("=")[0].strip().partition(".")
        name, keys = key.partition(".")[0], tree[section]
        if isinstance(keys, dict):
            named = {k: v for k, v in keys.items() if name in ("", k)}
            found[section] = found.get(section, {}) | named
    return found


def kept_defaults(config: RunConfig, overrides: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """The old defaults that :func:`override` keeps although the overrides would change them.

    A configuration does not record whether a value was given: one equal to its key's default counts
    as left out.

    Returns:
        `{key: (value, default)}` of keys that the overrides do not name.

    Raises:
        ConfigError: an override is wrong.
    """
    given = list(overrides)
    before = to_flat(config)
    defaults = _with_defaults(to_tree(config), DEPENDENT_DEFAULTS)
    left_out = [key for key in DEPENDENT_DEFAULTS if before[key] == defaults[key]]
    kept = to_flat(override(config, given))
    defaults = _with_defaults(to_tree(config), left_out, given)
    return {k: (kept[k], defaults[k]) for k in left_out if kept[k] != defaults[k]}


def _with_defaults(
    tree: dict[str, Any], keys: Iterable[str], overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """A configuration, flat, as if `keys` had been left out; changes `tree`."""
    apply_overrides(tree, [f"{key}=null" for key in keys])
    apply_overrides(tree, overrides)
    return to_flat(complete(msgspec.convert(tree, examined(RunConfig), strict=True)))


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Writes `section.key=value` pairs into nested dictionaries in place; values are YAML."""
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"-o takes key=value, not '{item}'")
        *sections, last = key.strip().split(".")
        node = tree
        for section in sections:
            child = node.get(section)
            if child is None:  # a section that may be left out, or is empty
                child = node[section] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"unknown key '{key}'{nearest(key)}")
            node = child
        node[last] = parse_yaml(value, f"-o {key}", key.strip())


def to_tree(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values."""
    tree: dict[str, Any] = msgspec.to_builtins(config)
    return tree


def to_flat(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values by dotted key."""
    return flatten(to_tree(config))


def dump(config: RunConfig) -> str:
    """The configuration as YAML text, with every key."""
    return dump_yaml(to_tree(config))


def dump_session(config: RunConfig) -> str:
    """The text of a session's config.yaml; :func:`load_session` notices if it is cut off."""
    return enclose(dump(config))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Joins nested keys with dots: `{"kl": {"beta": 1}}` becomes `{"kl.beta": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, as `{key: (old, new)}`, sorted."""
    before, after = to_flat(old), to_flat(new)
    keys = sorted(before.keys() | after.keys())
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def check_resumable(old: RunConfig, new: RunConfig) -> None:
    """Checks that a resume keeps the model and the order of the data.

    Raises:
        ConfigError: a key that is fixed at the start of a run differs.
    """
    for key in _changed_keys(old, new):
        if is_fixed_at_start(key):
            alternative = "" if _is_in_checkpoints(key, old, new) else ", or fork instead"
            reason = "it determines the model or the order of the data"
            if key == "train.optimiser":
                reason = "the checkpoint holds its state"
            raise ConfigError(
                f"{key} cannot change on a resume because {reason}: start a new run with it"
                f"{alternative}"
            )


def check_forkable(old: RunConfig, new: RunConfig) -> None:
    """Checks that a fork can load a checkpoint of the old run.

    Raises:
        ConfigError: a `lora` key differs, or the value function that is trained.
    """
    for key in _changed_keys(old, new):
        if _is_in_checkpoints(key, old, new):
            merged = "with --merged " if old.lora.rank is not None else ""
            raise ConfigError(
                f"{key} cannot change on a fork because the checkpoint depends on it: "
                f"export the policy {merged}and start a new run from it"
            )


def _changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """The keys whose values differ; last `lora.alpha`, whose default follows from `lora.rank`."""
    return sorted(changes(old, new), key=lambda key: (key == "lora.alpha", key))


def _is_in_checkpoints(key: str, old: RunConfig, new: RunConfig) -> bool:
    """Whether a key that differs determines what a checkpoint holds: adapters, value function."""
    if key in ("model.value", "ppo.advantage"):
        return old.trained_value != new.trained_value
    return key.startswith("lora.")
