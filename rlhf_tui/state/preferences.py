"""The saved preferences: theme, charts, and what was seen last.

Under $XDG_CONFIG_HOME and $XDG_STATE_HOME. A file that cannot be read is ignored with a notice. If
a file cannot be written, the preferences are lost when the app ends.
"""

import threading
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from engine import metrics
from engine.examined import examined
from engine.session.access import user_folder
from engine.session.folder import write_atomically

CHARTS = [metrics.SCORE, metrics.KL, metrics.CLIP_FRACTION, metrics.BETA]
THEME_NAMES = ("dark", "light", "contrast")
SEEN_KEPT = 200
_saving = threading.Lock()
"""The app saves in threads. The last one to run writes the current values."""


class Preferences(Struct, kw_only=True):
    """The operator's choices."""

    theme: str = THEME_NAMES[0]
    charts: list[str] = msgspec.field(default_factory=lambda: list(CHARTS))
    """Metrics; `a + b` puts two on one chart."""
    columns: Annotated[int, Meta(ge=0, le=4)] = 0
    """Number of columns of charts; 0: as many as fit."""
    log: list[str] = []
    """Metrics on a logarithmic scale."""
    weight: Annotated[float, Meta(ge=0, lt=1)] = 0.6
    """Weight of the moving average; 0: off."""
    past: bool = True
    """Whether earlier attempts are drawn."""
    listed_metric: str = metrics.SCORE
    """The metric that the list of sessions shows."""

    def metrics(self) -> list[str]:
        """The metrics of all charts, in their order, with those drawn beside them."""
        return metrics.with_drawn(name for chart in self.charts for name in names_of(chart))


def names_of(chart: str) -> list[str]:
    """The metrics of a chart of the preferences."""
    return [name.strip() for name in chart.split(" + ")]


class Seen(Struct, kw_only=True):
    """A session as the operator last saw it."""

    time: float
    step: int
    event: int
    began: float = 0.0
    """When the session began, to recognise another one in the same folder; 0 if unknown."""
    pending: list[str] = []
    """Ids of the commands that were pending."""


SeenAll = dict[str, Seen]
_T = TypeVar("_T")


def preferences_file() -> Path:
    """The file of the preferences."""
    return user_folder("XDG_CONFIG_HOME", ".config") / "preferences.json"


def seen_file() -> Path:
    """The file of what was seen."""
    return user_folder("XDG_STATE_HOME", ".local/state") / "seen.json"


def load_preferences() -> tuple[Preferences, str]:
    """Loads the preferences; also returns what is wrong with their file (empty: nothing)."""
    found, problem = _load(preferences_file(), Preferences)
    found = found or Preferences()
    if found.theme not in THEME_NAMES:
        found.theme = THEME_NAMES[0]
    found.charts = found.charts or list(CHARTS)
    return found, problem


def load_seen() -> SeenAll:
    """Loads what was seen, by the session's folder."""
    return _load(seen_file(), SeenAll)[0] or {}


def save(path: Path, value: Preferences | SeenAll) -> str:
    """Writes a file atomically. Returns why it failed; empty if it succeeded."""
    try:
        with _saving:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")
    except OSError as error:
        return f"cannot save {path}: {error.strerror}"
    return ""


def remember_seen(folder: str, seen: Seen) -> None:
    """Adds what was seen of a session to what other terminals have saved."""
    known = load_seen() | {folder: seen}
    newest = sorted(known, key=lambda f: known[f].time)[-SEEN_KEPT:]
    save(seen_file(), {f: known[f] for f in newest})


def _load(path: Path, kind: type[_T]) -> tuple[_T | None, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=examined(kind)), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, msgspec.DecodeError) as error:
        return None, f"{path} cannot be read and is ignored: {error}"
