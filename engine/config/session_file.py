"""The text of a session's config.yaml. Imports no YAML, so that lists of sessions are quick."""

import contextlib
import stat
from pathlib import Path

from engine.errors import ConfigError

MAX_BYTES = 1_000_000
"""Most bytes of a configuration file."""
FIRST_LINE, LAST_LINE = "--- # every key of the run; the last line is three dots", "..."
"""YAML's markers of the start and the end of a document. Without the last one, a file that was cut
off at the end of a line would be a valid configuration, with defaults for what is missing. Earlier
versions wrote neither."""


def enclose(text: str) -> str:
    """A configuration in YAML as a session's file holds it."""
    return f"{FIRST_LINE}\n{text}{LAST_LINE}\n"


def read_text(path: Path) -> str:
    """The text of any configuration file.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (OSError, ValueError, RuntimeError) as error:  # a folder, NUL, a loop of links
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"cannot read {path}: {reason}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES} bytes; it is not a configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a YAML file: it holds no text in UTF-8") from error


def read_session_text(path: Path) -> str:
    """The text of a session's config.yaml.

    Raises:
        ConfigError: it cannot be read, is empty, or is cut off.
    """
    with contextlib.suppress(OSError):  # which reading it reports
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ConfigError(f"cannot read {path}: it is not a regular file; move it away")
    text = read_text(path)
    if not text.strip():
        raise ConfigError(f"{path} is empty; restore it from a copy")
    if text.startswith(FIRST_LINE) and text.rstrip().rpartition("\n")[2] != LAST_LINE:
        raise ConfigError(
            f"{path} is cut off: its last line is not '{LAST_LINE}'; restore it from a copy"
        )
    return text
