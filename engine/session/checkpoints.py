"""Checkpoints as read without torch: names, the marker of complete ones, sums, and settings.

The ranks read the rest of their contents.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from engine.examined import examined
from engine.session.access import open_to_read, read_bytes

COMPLETE = "COMPLETE"
"""The file that is created last, once the journal holds everything up to the checkpoint's step. It
holds the SHA-256 of state.json, which holds those of all other files. Empty in older versions."""
STATE = "state.json"
POLICY = "policy"
AVERAGED_POLICY = "policy-ema"
"""Folders of a checkpoint that transformers or peft can load: the policy, and its average over
the steps if the run has `train.ema`."""
BASE_ADAPTERS = "base_adapter_config.json"
"""In these folders if they hold adapters: peft's configuration of other adapters, which were merged
into the base model when it was loaded. The folder's own adapters then fit no model on disk."""
TRANSIENT_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EKEYEXPIRED,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN,
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
)  # fmt: skip
"""Errors that say nothing about a file's content: this user may not read it, this machine is out of
resources, or the file system is away. No step may be abandoned because of them."""
_NAME = re.compile(r"step-(\d{6,})")
_ASIDE = re.compile(r"step-(\d{6,})-attempt-(\d+)(?:-(\d+))?")


class _Sums(msgspec.Struct):
    """The part of state.json that this module reads."""

    hashes: dict[str, str]


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint inside a session's checkpoints folder."""
    return checkpoints / f"step-{step:06d}"


def aside_path(checkpoints: Path, step: int, attempt: int) -> Path:
    """Where a checkpoint of an abandoned branch stays when its step has another one.

    If the path is taken, a number is appended: a journal that was restored from a copy counts the
    attempts after it again.
    """
    path = taken = checkpoints / f"step-{step:06d}-attempt-{attempt}"
    number = 1
    while path.exists():
        number += 1
        path = taken.with_name(f"{taken.name}-{number}")
    return path


def complete_checkpoints(checkpoints: Path, *, lenient: bool = False) -> dict[int, Path]:
    """All complete checkpoints by step, in ascending order.

    Args:
        checkpoints: the folder of a session's checkpoints.
        lenient: whether those that cannot be looked at are left out. Older ones always are.

    Raises:
        OSError: one cannot be looked at that may be the newest, such as the folder of another user.
            A run that took it for a missing one would abandon its steps.
    """
    found, errors = _scan(checkpoints)
    if errors and not lenient and max(errors) > max(found, default=0):
        raise errors[max(errors)]
    return dict(sorted(found.items()))


def unreadable_checkpoints(checkpoints: Path) -> dict[int, OSError]:
    """The steps of checkpoints that cannot be looked at, and why, in ascending order."""
    return dict(sorted(_scan(checkpoints)[1].items()))


def _scan(checkpoints: Path) -> tuple[dict[int, Path], dict[int, OSError]]:
    """The complete checkpoints by step, and why others cannot be looked at, in no order."""
    found, errors = {}, {}
    for step, folder in _folders(checkpoints):
        try:
            if _has_marker(folder):
                found[step] = folder
        except OSError as error:
            errors[step] = error
    return found, errors


def _folders(checkpoints: Path) -> Iterator[tuple[int, Path]]:
    """The folders of checkpoints with their steps, in no order."""
    for folder in checkpoints.glob("step-*"):
        if match := _NAME.fullmatch(folder.name):
            yield int(match[1]), folder


def _has_marker(folder: Path) -> bool:
    """Whether a folder has :data:`COMPLETE`. Raises OSError if that cannot be seen."""
    try:
        (folder / COMPLETE).stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    return True


def aside_checkpoints(checkpoints: Path) -> dict[str, Path]:
    """The checkpoints at :func:`aside_path`, sorted: `120-attempt-2` → its folder."""
    found = {}
    for folder in checkpoints.glob("step-*-attempt-*"):
        if match := _ASIDE.fullmatch(folder.name):
            found[int(match[1]), int(match[2]), int(match[3] or 0)] = folder
    return {
        f"{step}-attempt-{attempt}" + (f"-{number}" if number else ""): folder
        for (step, attempt, number), folder in sorted(found.items())
    }


def incomplete_checkpoints(checkpoints: Path) -> list[Path]:
    """The folders of checkpoints without :data:`COMPLETE`: partly written or partly removed."""
    found = []
    for _, folder in _folders(checkpoints):
        with contextlib.suppress(OSError):  # what cannot be looked at may be complete
            if not _has_marker(folder):
                found.append(folder)
    return sorted(found)


def mark_complete(folder: Path) -> None:
    """Creates the marker, synced to disk; from then on the checkpoint can be resumed from.

    Raises:
        OSError: the marker cannot be written; no marker is left behind.
    """
    marker, part = folder / COMPLETE, folder / f".{COMPLETE}.part"
    try:
        part.write_text(f"{sha256(folder / STATE)}\n", encoding="utf-8")
        sync(part)
        part.replace(marker)
        sync(folder)
    except OSError:
        part.unlink(missing_ok=True)
        marker.unlink(missing_ok=True)  # a save reported as failed must not count later
        raise


def completed_at(folder: Path) -> float:
    """When a checkpoint became complete, or its copy was made. Raises OSError."""
    return (folder / COMPLETE).stat().st_ctime  # which no program that copies can set


def mark_incomplete(folder: Path) -> None:
    """Makes a checkpoint incomplete, the first part of its removal. Raises OSError."""
    (folder / COMPLETE).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Removes a checkpoint, ``COMPLETE`` first: a partly removed checkpoint never counts.

    Raises:
        OSError: it cannot be removed. One that is gone, or that a save clears away, is no error.
    """
    mark_incomplete(folder)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def find_damage(folder: Path, part: str = "", copy: Path | None = None) -> str | None:
    """Checks the files of a complete checkpoint against their sums.

    Reads all of them, which takes about a second for each gigabyte.

    Args:
        folder: of the checkpoint.
        part: a folder in it whose files alone are checked, besides state.json.
        copy: a copy of that folder, which is checked in its place.

    Returns:
        What is wrong with the first damaged file, to follow "the checkpoint ... is damaged: "; None
        if all files are as they were written.

    Raises:
        OSError: a file cannot be read for a reason that may pass, see :data:`TRANSIENT_ERRORS`.
    """
    if problem := _find_state_damage(folder):
        return problem
    try:
        sums = msgspec.json.decode(read_bytes(folder / STATE), type=examined(_Sums)).hashes
        for name, expected in sums.items():
            if part and not name.startswith(f"{part}/"):
                continue
            path = folder / name if copy is None else copy / Path(name).relative_to(part)
            if not path.is_file():
                return f"{name} is missing"
            if sha256(path) != expected:
                return f"{name} does not match its hash"
    # Not readable; not JSON, or a name with NUL; nested too deep.
    except (OSError, ValueError, RecursionError) as error:
        raise_if_transient(error)
        return f"{STATE}: {error}"
    return None


def _find_state_damage(folder: Path) -> str | None:
    """Like :func:`find_damage`, for state.json alone. An empty COMPLETE, without a sum, passes."""
    try:
        expected = read_bytes(folder / COMPLETE).decode("ascii").strip()
        if expected and sha256(folder / STATE) != expected:
            return f"{STATE} does not match its hash in {COMPLETE}"
    except (OSError, ValueError) as error:
        raise_if_transient(error)
        return f"{STATE} or {COMPLETE} cannot be read: {error}"
    return None


def raise_if_transient(error: Exception) -> None:
    """Raises an error of :data:`TRANSIENT_ERRORS` again; returns for damaged and missing files."""
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRORS:
        raise error


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits. Raises OSError."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Syncs a file or a folder to disk, if the file system can. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


class _SavedState(msgspec.Struct, frozen=True):
    settings: dict[str, Any] = {}
    """A mapping, because versions have different settings."""


class StateSummary(msgspec.Struct, frozen=True):
    """The part of a checkpoint's state.json that can be read without torch."""

    score: float | None = None
    kl: float | None = None
    state: _SavedState = _SavedState()


def read_summary(folder: Path) -> StateSummary:
    """Reads state.json; empty if it is unreadable, which the rank that loads it then reports."""
    try:
        return msgspec.json.decode(read_bytes(folder / STATE), type=examined(StateSummary))
    except (OSError, msgspec.DecodeError, RecursionError):
        return StateSummary()


def saved_settings(folder: Path) -> dict[str, Any]:
    """The live settings that a checkpoint restores: those in force after its step; may be empty."""
    return read_summary(folder).state.settings
