"""Changes, undoes, and (after a crash) repeats changes of a run's live settings on each rank."""

from typing import Any

import msgspec

from engine.config.rules.run_config import check_change
from engine.config.settings import (
    SettingChange,
    Settings,
    change_settings,
    have_effect,
    invalid_values,
    settings_of,
)
from engine.errors import CommandRejectedError
from engine.protocol.commands import Undo
from engine.protocol.rank_messages import Begin
from engine.train.run import Run, max_response_tokens


class LiveSettings:
    """Changes the settings in `run.config`. Use it only between steps and equally on all ranks."""

    def __init__(self, run: Run, begin: Begin) -> None:
        """Takes over the changes that earlier attempts made after the checkpoint.

        Args:
            run: the run; each change replaces its configuration.
            begin: holds the changes to repeat and those that can be undone.
        """
        self._run = run
        self._to_repeat = begin.repeat
        self._undoable = list(begin.undoable)

    def repeat(self, step: int) -> None:
        """Reapplies the changes that commands of earlier attempts made before this step."""
        for earlier in self._to_repeat:
            # Without changes, later commands have replaced all of it, so there is nothing to undo.
            if earlier.step != step or not earlier.changes:
                continue
            changes = self.set({c.key: c.new for c in earlier.changes})
            if earlier.command == Undo.name():
                del self._undoable[-1:]
            elif have_effect(earlier.changes):
                self._undoable.append(changes)
        # A repeated step must not apply them again.
        self._to_repeat = [r for r in self._to_repeat if r.step != step]

    def of_step(self, step: int) -> Settings:
        """Returns the settings of the next step, including changes still to be repeated."""
        repeated = {c.key: c.new for r in self._to_repeat if r.step == step for c in r.changes}
        return settings_of(change_settings(self._run.config, repeated))

    def change(self, values: dict[str, Any]) -> list[SettingChange]:
        """Changes settings; if any value differs from before, :meth:`undo` can revert the change.

        Args:
            values: new value by setting, of its type and in its range.

        Raises:
            CommandRejectedError: a value conflicts with the model or with other keys.
        """
        changes = self._override(values)
        if have_effect(changes):
            self._undoable.append(changes)
        return changes

    def undo(self) -> list[SettingChange]:
        """Reverts the last change.

        Raises:
            CommandRejectedError: there is no change to undo, or the old value is no longer valid.
        """
        if not self._undoable:
            raise CommandRejectedError("there is no change to undo")
        values = {c.key: c.old for c in self._undoable.pop()}
        # An earlier version without bounds may have set the old value or stored it in a checkpoint.
        if problems := invalid_values(values):
            raise CommandRejectedError(f"the change cannot be undone: {min(problems.values())}")
        return self._override(values)

    def _override(self, values: dict[str, Any]) -> list[SettingChange]:
        """Changes settings, and drops pending repetitions of changes to the same settings."""
        limit = max_response_tokens(self._run)
        if limit is not None and values.get("max_new_tokens", 0) > limit:
            replies = self._run.config.reply_tokens
            and_replies = f" and environment.max_tokens ({replies})" if replies else ""
            raise CommandRejectedError(
                f"max_new_tokens must be at most {limit}: the models have no more positions "
                f"after the longest prompt ({self._run.prompts.longest} tokens){and_replies}"
            )
        check_change(self._run.config, values)
        self._to_repeat = [
            msgspec.structs.replace(r, changes=[c for c in r.changes if c.key not in values])
            for r in self._to_repeat
        ]
        return self.set(values)

    def set(self, values: dict[str, Any]) -> list[SettingChange]:
        """Changes settings without validation. Not caused by a command, so it cannot be undone."""
        before = msgspec.structs.asdict(settings_of(self._run.config))
        self._run.config = change_settings(self._run.config, values)
        return [SettingChange(key=k, old=before[k], new=v) for k, v in values.items()]
