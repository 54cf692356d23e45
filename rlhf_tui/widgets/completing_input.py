"""An input field that completes configuration keys or paths. Tab takes the completion."""

import asyncio
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.suggester import Suggester

from rlhf_tui.text import one_line
from rlhf_tui.widgets.text_input import TextInput

MAX_FILES = 2000
"""Maximum number of a folder's entries that are read: a huge folder must not block typing."""
CONFIG_FILES = (".yaml", ".yml")


class CompletingInput(TextInput):
    """Tab takes the completion, or moves to the next field if there is none."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("tab", "complete", "complete", show=False)]

    def action_complete(self) -> None:
        """Takes the completion that is shown."""
        before = self.value
        if self.cursor_position == len(before):
            self.action_cursor_right()
        if self.value == before:
            self.screen.focus_next()


class KeySuggester(Suggester):
    """Completes the last of several `key=value`: first the key, then its current value."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """`values`: key → current value as text; an earlier key is suggested first."""
        super().__init__(use_cache=False, case_sensitive=True)
        self._values = values

    async def get_suggestion(self, value: str) -> str | None:
        """The whole text with its last word completed; None if nothing fits."""
        before, space, word = value.rpartition(" ")
        key, equals, given = word.partition("=")
        if equals:
            present = str(self._values.get(key, ""))
            found = f"{key}={present}" if present.startswith(given) else None
        else:
            found = next((f"{k}=" for k in self._values if word and k.startswith(word)), None)
        return None if found is None else f"{before}{space}{found}"


class PathSuggester(Suggester):
    """Completes the path of a configuration file."""

    def __init__(self) -> None:
        super().__init__(use_cache=False, case_sensitive=True)

    async def get_suggestion(self, value: str) -> str | None:
        """The whole text with its last part completed; None if nothing fits."""
        found = await asyncio.to_thread(completions, value)
        return value[: value.rfind("/") + 1] + found[0] if found else None


def completions(text: str) -> list[str]:
    """The names of folders and YAML files that continue a path, sorted; folders end in `/`.

    Names with control characters are left out: they could not be shown as they are.
    """
    folder, _, begin = text.rpartition("/")
    root = "/" if text.startswith("/") and not folder else folder
    found = []
    try:
        with os.scandir(Path(root or ".").expanduser()) as entries:
            for entry in itertools.islice(entries, MAX_FILES):
                name = entry.name
                hidden = name.startswith(".") and not begin.startswith(".")
                if not name.startswith(begin) or hidden or one_line(name) != name:
                    continue
                if entry.is_dir():
                    found.append(f"{name}/")
                elif name.endswith(CONFIG_FILES):
                    found.append(name)
    except (OSError, RuntimeError):  # no such folder, or ~NAME of nobody
        return []
    return sorted(found)
