"""Checks names, files and `key=value` overrides of a start, and tells what it would do."""

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from engine import starter
from engine.config import file as config_file
from engine.config.key_errors import known_keys
from engine.config.schema import RunConfig, is_fixed_at_start
from engine.config.settings import LIVE_SETTINGS, change_settings
from engine.errors import ConfigError, RlhfError
from engine.launch.failed_start import is_failed_start
from engine.launch.inputs import check_inputs
from engine.launch.start import forked_config, resumed_config
from engine.session.folder import SessionFolder, check_name, free_name
from rlhf_tui.format import value_text
from rlhf_tui.widgets.completing_input import completions

MAX_NAMES = 6
"""Names of files that are listed below a path."""


class FormError(Exception):
    """The typed input cannot be used; the message is for the operator."""


class IncompleteError(FormError):
    """The typed input is the beginning of one that can be used; the message says how to go on."""


def split_overrides(text: str) -> list[str]:
    """The `key=value` pairs of a line; a value with spaces stands in quotes. Raises FormError."""
    try:
        words = shlex.split(text)
    except ValueError:
        raise FormError("a quote is not closed") from None
    for word in words:
        if "=" not in word:
            example = "kl.beta=0.1, in quotes if the value has spaces"
            raise FormError(f"'{word}': type key=value, such as {example}")
    return words


class EarlierRun(Struct, frozen=True):
    """The run to resume or fork, as it was at the chosen step."""

    config: RunConfig
    """The configuration in the session's file."""
    in_force: RunConfig
    """The same with the live settings that the start would restore."""

    @classmethod
    def of(cls, config: RunConfig, settings: dict[str, Any]) -> "EarlierRun":
        """`settings`: live settings to restore; those that this version lacks are left out."""
        known = {key: value for key, value in settings.items() if key in LIVE_SETTINGS}
        try:
            return cls(config, change_settings(config, known))
        except msgspec.ValidationError:  # another version's type
            return cls(config, config)

    def values(self, *, fixed: bool) -> dict[str, str]:
        """Key → current value, those that may change during a run first, starting with beta.

        Args:
            fixed: whether to include the keys that are fixed on a resume.
        """
        flat = config_file.to_flat(self.in_force)
        keys = dict.fromkeys([*LIVE_SETTINGS.values(), *known_keys()])
        return {
            key: yaml_text(flat[key])
            for key in keys
            if key in flat and (fixed or not is_fixed_at_start(key))
        }

    def resumed(self, overrides: list[str]) -> RunConfig:
        """The configuration after a resume. Raises ConfigError."""
        return self._checked(resumed_config, overrides)

    def forked(self, overrides: list[str]) -> RunConfig:
        """The configuration after a fork. Raises ConfigError."""
        return self._checked(forked_config, overrides)

    def _checked(
        self, make: Callable[[RunConfig, Iterable[str]], RunConfig], overrides: list[str]
    ) -> RunConfig:
        make(self.config, overrides)
        return config_file.override(self.in_force, overrides)

    def changed(self, new: RunConfig) -> str:
        """The differences from this run, as `key old → new`."""
        return changes_text(config_file.changes(self.in_force, new))


def yaml_text(value: Any) -> str:
    """A value as it is typed after `key=`."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def changes_text(changes: dict[str, tuple[Any, Any]]) -> str:
    """Changes as `kl.beta 0.05 → 0.3, ppo.epochs 2 → 4`."""
    return ", ".join(
        f"{key} {value_text(old)} → {value_text(new)}" for key, (old, new) in changes.items()
    )


def check_new_name(root: Path, text: str) -> str:
    """Checks the name of a new session.

    Returns:
        What would happen to the folder of that name.

    Raises:
        FormError: the name cannot be used, or is taken.
    """
    name = text.strip()
    try:
        check_name(name)
    except RlhfError as error:
        raise FormError(str(error)) from error
    if not (root / name).exists():
        return f"folder: {root / name}"
    if is_failed_start(SessionFolder(root / name)):
        return f"'{name}' failed before its first step; it is replaced"
    raise FormError(f"'{name}' already exists")


def check_config_file(root: Path, path: str, name: str, overrides: list[str]) -> str:
    """Checks a new run from a configuration file.

    Returns:
        What would be started.

    Raises:
        FormError: a field is wrong; the message is that of the configuration.
    """
    file = typed_path(path)
    try:
        if not file.is_file():
            raise _missing_file(path)
    except OSError as error:  # in a folder of another user, or a name that is too long
        raise FormError(f"{error.strerror}: {path}") from error
    try:
        config = config_file.load(file, overrides)
        check_inputs(config)
    except ConfigError as error:
        raise FormError(str(error)) from error
    name = name or free_name(root, file.stem)
    return f"{config.train.steps:,} steps, {check_new_name(root, name)}"


def values_of_file(path: str) -> dict[str, str]:
    """The values of a configuration file as :meth:`EarlierRun.values`; empty if it has none."""
    file = typed_path(path)
    try:
        if not file.is_file():
            return {}
        config = config_file.load(file)
    except (ConfigError, OSError):
        return {}
    return EarlierRun(config, config).values(fixed=True)


def typed_path(text: str) -> Path:
    """A typed path; `~` is the home folder, `starter:demo` the file of that name."""
    try:
        return Path(starter.resolve(text)).expanduser()
    except RuntimeError:  # ~NAME of nobody
        return Path(text)


def _missing_file(path: str) -> FormError:
    """Why a path is not a configuration file yet, with the names that would complete it."""
    found = completions(path)
    if not found and path:
        return FormError(f"no configuration file at {path}")
    if not found:
        return IncompleteError("type the path of a YAML file; rlhf-tui init writes one")
    more = f"  and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else ""
    return IncompleteError("continue with  " + "  ".join(found[:MAX_NAMES]) + more)
