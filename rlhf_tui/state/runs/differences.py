"""The configuration keys in which several runs differ."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.config.settings import LIVE_SETTINGS
from engine.journal.reader import JournalReader
from engine.session.folder import SessionFolder

if TYPE_CHECKING:  # the schema takes long to import
    from engine.config.schema import RunConfig

LAST_STEP_SUFFIX = " @ last step"
"""Behind the key of a setting whose value is that after the last step of each run."""
NAMED_ALIKE = ("model", "data", "reward")
"""Sections whose keys are shown with the section: `path` alone says little."""


def configuration_of(session: SessionFolder) -> dict[str, Any]:
    """Every configuration key with its value, of any type; for live settings the one in force.

    Raises:
        RlhfError: the journal or the configuration cannot be read.
    """
    from engine.config import file as config_file  # noqa: PLC0415 - YAML is slow to import

    flat = config_file.to_flat(session.config())
    with JournalReader(session) as reader:
        settings = reader.settings_after_last_step()
    return flat | {LIVE_SETTINGS[k]: v for k, v in settings.items() if k in LIVE_SETTINGS}


def settings_after(
    configs: Sequence["RunConfig"], settings: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """The settings after the last steps that differ, if one is not as it was configured.

    Args:
        configs: of the runs.
        settings: of the runs, in force after the last step. A setting that is missing, as all are
            before the first step, is that of the configuration.

    Returns:
        Key → the value of each run.
    """
    from engine.config import file as config_file  # noqa: PLC0415 - YAML is slow to import

    configured = [config_file.to_flat(config) for config in configs]
    found: dict[str, list[Any]] = {}
    for name, key in LIVE_SETTINGS.items():
        first = [flat.get(key) for flat in configured]
        last = [own.get(name, value) for own, value in zip(settings, first, strict=True)]
        if last != first and any(value != last[0] for value in last):
            found[key] = last
    return found


def differing(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ, those that may change during a run first."""
    keys = dict.fromkeys([*LIVE_SETTINGS.values(), *(k for each in configurations for k in each)])
    first = configurations[0]
    return [key for key in keys if any(c.get(key) != first.get(key) for c in configurations)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key → its last part, or the whole key if that would be ambiguous or says little."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: name if last.count(name) == 1 and key.partition(".")[0] not in NAMED_ALIKE else key
        for key, name in zip(keys, last, strict=True)
    }
