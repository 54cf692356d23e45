"""The configuration keys in which several runs differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.settings import LIVE_SETTINGS
from engine.journal.reader import JournalReader
from engine.session.folder import SessionFolder

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
        settings = reader.meta().settings or {}
    return flat | {LIVE_SETTINGS[k]: v for k, v in settings.items() if k in LIVE_SETTINGS}


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
