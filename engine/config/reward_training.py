"""Parses the settings of `rlhf-tui reward train`."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from engine.config.sections.reward_training import RewardTrainingConfig
from engine.config.type_errors import expected, shown
from engine.config.yaml_document import parse_yaml
from engine.errors import ConfigError
from engine.examined import examined


def parse_settings(items: Iterable[str]) -> RewardTrainingConfig:
    """Decodes `key=value` pairs; values are YAML.

    Raises:
        ConfigError: a pair, a key or a value is wrong.
    """
    keys = list(RewardTrainingConfig.__struct_fields__)
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise ConfigError(f"--set takes key=value, not '{item}'")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(keys)}"
            raise ConfigError(f"--set: unknown key '{key}'{hint}")
        values[key] = parse_yaml(text, f"--set {key}", key)
    try:
        return msgspec.convert(values, examined(RewardTrainingConfig), strict=True)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        key = re.sub(r"\W.*", "", path)
        raise ConfigError(
            f"--set: {key} must be {expected(message)}, not {shown(values.get(key))}"
        ) from None
