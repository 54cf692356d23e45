"""The values an operator may change while the run goes on, and what each may be set to.

A rank keeps them in one place, its :class:`~engine.config.schema.RunConfig` in force:
:func:`apply_settings` writes them into it and :func:`settings_of` reads them back, for checkpoints
and messages. They change between two steps only. Every change is one :class:`SettingChange`,
recorded with its old and its new value.
"""

import math
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from engine.config.schema import RunConfig
from engine.config.type_errors import expected, shown
from engine.errors import CommandRejectedError

LIVE_SETTINGS = {
    "beta": "kl.beta",
    "controller": "kl.controller",
    "target": "kl.target",
    "horizon": "kl.horizon",
    "beta_min": "kl.beta_min",
    "beta_max": "kl.beta_max",
    "learning_rate": "train.learning_rate",
    "save_every": "train.save_every",
    "clip_range": "ppo.clip_range",
    "epochs": "ppo.epochs",
    "stop_kl": "ppo.stop_kl",
    "temperature": "rollout.temperature",
    "max_new_tokens": "rollout.max_new_tokens",
}
"""Setting → its configuration key, which gives the first value, the type and the range."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may change at a step boundary. Fields carry the meaning of their configuration keys.

    With the adaptive controller `beta` is the controller's present value: it moves by itself.
    """

    beta: float
    controller: Literal["fixed", "adaptive"]
    target: float
    horizon: float
    beta_min: float
    beta_max: float
    learning_rate: float
    save_every: int
    clip_range: float
    epochs: int
    stop_kl: float | None
    temperature: float
    max_new_tokens: int


class SettingChange(Struct, frozen=True, kw_only=True):
    """One setting's new value, as journalled: `old → new`, from step `step` on."""

    key: str
    old: Any
    new: Any


def settings_of(config: RunConfig) -> Settings:
    """The settings in a configuration."""
    values = {}
    for name, path in LIVE_SETTINGS.items():
        section, key = path.split(".")
        values[name] = getattr(getattr(config, section), key)
    return msgspec.convert(values, Settings, strict=False)


def apply_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """The configuration with these settings in force; every other key stays."""
    sections: dict[str, dict[str, Any]] = {}
    for name, path in LIVE_SETTINGS.items():
        section, key = path.split(".")
        sections.setdefault(section, {})[key] = getattr(settings, name)
    changed = {name: replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return replace(config, **changed)


def change_settings(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The configuration with some settings changed, by name."""
    merged = msgspec.structs.asdict(settings_of(config)) | values
    return apply_settings(config, msgspec.convert(merged, Settings, strict=False))


def check_settings(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
    """The values as the settings would hold them. Raises CommandRejectedError."""
    now = msgspec.structs.asdict(settings)
    for name, value in values.items():
        section, key = LIVE_SETTINGS[name].split(".")
        kind = next(f.type for f in msgspec.structs.fields(_section(section)) if f.name == key)
        if isinstance(value, float) and not math.isfinite(value):
            raise CommandRejectedError(f"{name} must be a finite number (it is {value})")
        try:
            now[name] = msgspec.convert(value, kind, strict=True)
        except msgspec.ValidationError as error:
            wanted = expected(str(error).partition(", got")[0])
            raise CommandRejectedError(f"{name} must be {wanted} (it is {shown(value)})") from None
    if not now["beta_min"] < now["beta_max"]:
        raise CommandRejectedError(
            f"beta_min ({now['beta_min']:g}) must be below beta_max ({now['beta_max']:g})"
        )
    return {name: now[name] for name in values}


def _section(name: str) -> type[Struct]:
    sections = {f.name: f.type for f in msgspec.structs.fields(RunConfig)}
    found: type[Struct] = sections[name]
    return found


def setting_name(key: str) -> str:
    """`kl.beta` and `beta` are both `beta`. Raises CommandRejectedError for an unknown one."""
    for name, path in LIVE_SETTINGS.items():
        if key in (name, path):
            return name
    raise CommandRejectedError(
        f"'{key}' cannot be set while the run goes on; these can: {', '.join(LIVE_SETTINGS)}"
    )
