"""Settings in dialogs: what a typed value means, and what a roll back would change."""

from typing import Any

from engine.config.settings import Settings
from engine.protocol.commands import SetSetting
from engine.session.checkpoints import checkpoint_path, saved_settings
from rlhf_tui.state.checkpoint_details import changed_settings
from rlhf_tui.state.steering_target import SteeringTarget
from rlhf_tui.widgets.lines import Row

OFF = {
    "stop_kl": "the passes never end early",
    "clip_range_high": "the same as clip_range",
    "dual_clip": "no bound",
    "entropy_target": "the entropy bonus has a fixed weight",
}
"""Settings that may be off (null), and what that means."""


def settings_after(target: SteeringTarget, step: int) -> list[Row]:
    """The settings that a roll back to a checkpoint's step changes, old → new."""
    saved = saved_settings(checkpoint_path(target.session.checkpoints, step))
    if not saved:
        return [
            [(f"Beta, the controller and all settings return to those of step {step}.", "warn")]
        ]
    changed = changed_settings(target.settings, saved)
    if not changed:
        return [[("All settings, beta included, stay as they are now.", "dim")]]
    rows: list[Row] = [[(f"All settings, beta included, return to those of step {step}:", "")]]
    for key, old, new in changed:
        rows.append([(f"  {key:<15}", "dim"), (f"{old} → ", ""), (new, "strong")])
    return rows


def parse_value(key: str, text: str, settings: Settings) -> Any:
    """A typed value as the setting would hold it. Raises CommandRejectedError."""
    value: Any = text.strip()
    if key in OFF and value in ("off", "none", ""):
        value = None
    else:
        for kind in (int, float):
            try:
                value = kind(text)
                break
            except ValueError:
                continue
    return SetSetting(key=key, value=value).new_values(settings)[key]
