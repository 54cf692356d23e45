"""Live settings: the configuration keys that an operator can change during a run.

A rank holds their values in its :class:`~engine.config.schema.RunConfig` only. For checkpoints and
messages, :func:`settings_of` reads them from it and :func:`apply_settings` writes them into it.
Settings change between two steps only. Each change is recorded as a :class:`SettingChange` with the
old and the new value.
"""

import difflib
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from engine.config.names_elsewhere import KEYS_HERE
from engine.config.type_errors import expected, shown
from engine.errors import CommandRejectedError
from engine.examined import examined

if TYPE_CHECKING:  # the app imports this module and waits for it; it needs no schema to start
    from engine.config.schema import RunConfig

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
    "clip_range_high": "ppo.clip_range_high",
    "dual_clip": "ppo.dual_clip",
    "entropy_coef": "ppo.entropy_coef",
    "entropy_target": "ppo.entropy_target",
    "loss_aggregation": "ppo.loss_aggregation",
    "epochs": "ppo.epochs",
    "stop_kl": "ppo.stop_kl",
    "temperature": "rollout.temperature",
    "max_new_tokens": "rollout.max_new_tokens",
    "micro_batch_size": "ppo.micro_batch_size",
}
"""Setting → configuration key, which defines its initial value, type and range."""
ONCE_FIXED = ("micro_batch_size",)
"""Settings that were once fixed keys: checkpoints from that time lack them, and were trained with
the configuration's value."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values of all live settings. A field has the meaning of its configuration key.

    With the adaptive controller, `beta` is the current value of the controller.
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
    # Checkpoints of earlier versions do not have these; the defaults are what they trained with.
    clip_range_high: float | None = None
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    entropy_target: float | None = None
    loss_aggregation: Literal["token", "sequence", "sequence_sum", "sequence_sum_constant"] = (
        "token"
    )
    micro_batch_size: int | None = None
    """None in such a checkpoint, see :data:`ONCE_FIXED`."""


class SettingChange(Struct, frozen=True, kw_only=True):
    """A change of one setting, as the journal records it."""

    key: str
    old: Any
    new: Any


def have_effect(changes: list[SettingChange]) -> bool:
    """Whether any setting has a new value; `undo` skips commands that changed none."""
    return any(change.old != change.new for change in changes)


def settings_of(config: "RunConfig") -> Settings:
    """The live settings of a configuration."""
    values = {}
    for name, path in LIVE_SETTINGS.items():
        section, key = path.split(".")
        values[name] = getattr(getattr(config, section), key)
    return msgspec.convert(values, examined(Settings), strict=False)


def apply_settings(config: "RunConfig", settings: Settings) -> "RunConfig":
    """Returns the configuration with these settings; every other key is unchanged."""
    sections: dict[str, dict[str, Any]] = {}
    for name, path in LIVE_SETTINGS.items():
        section, key = path.split(".")
        value = getattr(settings, name)
        if value is not None or name not in ONCE_FIXED:
            sections.setdefault(section, {})[key] = value
    changed = {name: replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return replace(config, **changed)


def change_settings(config: "RunConfig", values: dict[str, Any]) -> "RunConfig":
    """Returns the configuration with the named settings changed.

    The values must have passed :func:`check_settings`; their ranges are not checked again.
    """
    merged = msgspec.structs.asdict(settings_of(config)) | values
    return apply_settings(config, msgspec.convert(merged, examined(Settings), strict=False))


def check_settings(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
    """Checks new values of settings against their types, their ranges and the current settings.

    Args:
        settings: the current ones.
        values: setting → new value, as a command gives it.

    Returns:
        The same keys with values of the settings' types.

    Raises:
        CommandRejectedError: a value has the wrong type or is out of range.
    """
    now = msgspec.structs.asdict(settings)
    for name, value in values.items():
        now[name] = _check_value(name, value)
    if not now["beta_min"] < now["beta_max"]:
        raise CommandRejectedError(
            f"beta_min ({now['beta_min']:g}) must be below beta_max ({now['beta_max']:g})"
        )
    return {name: now[name] for name in values}


def invalid_values(values: dict[str, Any]) -> dict[str, str]:
    """The recorded values of settings that no command could set now.

    Journals and checkpoints of versions whose settings had no bounds may hold some.

    Returns:
        Setting → what is wrong with its value, in one sentence.
    """
    problems = {}
    for name, value in values.items():
        try:
            _check_value(name, value)
        except CommandRejectedError as error:
            problems[name] = str(error)
    return problems


def _check_value(name: str, value: Any) -> Any:
    """Returns a value in the setting's type. Raises CommandRejectedError."""
    section, key = LIVE_SETTINGS[setting_name(name)].split(".")
    kind = next(f.type for f in msgspec.structs.fields(_section(section)) if f.name == key)
    if isinstance(value, float) and not math.isfinite(value):
        raise CommandRejectedError(f"{name} must be a finite number, not {value}")
    try:
        return msgspec.convert(value, examined(kind), strict=True)
    except msgspec.ValidationError as error:
        wanted = expected(str(error))
        wanted = wanted or "one of " + ", ".join(map(str, get_args(kind)))
        raise CommandRejectedError(f"{name} must be {wanted}, not {shown(value)}") from None


def _section(name: str) -> type[Struct]:
    from engine.config.schema import RunConfig  # noqa: PLC0415 - as above

    sections = {f.name: f.type for f in msgspec.structs.fields(RunConfig)}
    found: type[Struct] = sections[name]
    return found


def setting_name(key: str) -> str:
    """The name of a setting, given that name or its configuration key (`beta` or `kl.beta`).

    Raises:
        CommandRejectedError: there is no such setting; the message names a similar one, or all.
    """
    names = {path: name for name, path in LIVE_SETTINGS.items()} | {n: n for n in LIVE_SETTINGS}
    if key in names:
        return names[key]
    here = KEYS_HERE.get(key)
    if near := [here] if here in names else difflib.get_close_matches(key, names, 1, 0.75):
        raise CommandRejectedError(
            f"'{key}' cannot be set during a run; did you mean '{names[near[0]]}'?"
        )
    raise CommandRejectedError(
        f"'{key}' cannot be set during a run; these can: {', '.join(LIVE_SETTINGS)}"
    )
