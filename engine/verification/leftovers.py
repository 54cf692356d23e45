"""Finds leftovers of killed processes, and checks who can access the session."""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from engine.journal.fork import unfinished_copies
from engine.session.checkpoints import incomplete_checkpoints
from engine.session.folder import SessionFolder
from engine.verification.finding import Finding, listed, note, problem

END_TIMEOUT = 5.0
"""Seconds within which the processes of an engine that has released its session must end."""
OWN_FILES = (
    "config.yaml", "journal.db", "samples.db", "labels.db", "engine.log", "engine.lock",
    "join.secret",
)  # fmt: skip
"""The files whose modes this software sets itself."""


ENGINE_MODULES = ("engine", "rlhf_tui.headless")
"""How the argument begins that names the module of a supervisor or a rank."""
ROLLOUT_ENGINE = "engine/train/rollout/vllm/process/start.py"
"""How the argument ends that names the script of a rollout engine, a path."""


def check_leftovers(session: SessionFolder, *, live: bool) -> Iterator[Finding]:
    """Looks for files and processes of engines that were killed."""
    if live:
        return
    folder = session.folder
    files = [
        *folder.glob(".config.yaml.*"), *folder.glob(".engine.json.*"),
        *folder.glob(".join.secret.*"), *folder.glob("join.secret"), *unfinished_copies(session),
        *session.checkpoints.glob(".*step-*"), *session.checkpoints.glob("step-*/.COMPLETE.part"),
    ]  # fmt: skip
    files += incomplete_checkpoints(session.checkpoints)
    if files:
        names = listed(sorted(str(f.relative_to(folder)) for f in files))
        text = f"files of interrupted writes are left: {names}"
        yield note("leftovers", text, "the next engine replaces or removes them; they do no harm")
    if session.engine_file.exists():
        text = "engine.json is left: the engine was killed"
        yield note("leftovers", text, session.command("resume"))
    pids = _outliving(session)
    if pids:
        yield problem(
            "leftovers",
            f"processes of the session outlive its engine: {listed(pids)}",
            f"end them: kill -9 {' '.join(map(str, pids))}",
        )


def _outliving(session: SessionFolder) -> list[int]:
    """The remaining processes of an engine; waits for those that are just ending."""
    deadline = time.monotonic() + END_TIMEOUT
    while pids := _processes(session.folder):
        if session.is_live():
            return []
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return pids


def _processes(folder: Path) -> list[int]:
    """The ids of engine processes of this session: they have its folder as an argument."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            ours = any(w.startswith(ENGINE_MODULES) or w.endswith(ROLLOUT_ENGINE) for w in words)
            if str(folder) in words and ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:  # it has ended, or belongs to another user
            continue
    return found


def check_access(session: SessionFolder) -> Iterator[Finding]:
    """Checks that nobody but the owner can read or change the session."""
    folder = session.folder
    owner, mode = _owner_and_mode(folder)
    if mode & 0o077:
        text = f"other users can enter the session's folder (mode {mode:04o})"
        yield problem("access", text, f"chmod 700 {folder}")
        open_files = [n for n in OWN_FILES if (folder / n).exists() and _mode(folder / n) & 0o077]
        if open_files:
            text = f"other users can read files of the session: {listed(open_files)}"
            yield problem("access", text, f"chmod -R go-rwx {folder}")
    _, root = _owner_and_mode(folder.parent)
    if root & 0o022 and not root & stat.S_ISVTX:
        text = f"other users can rename sessions in {folder.parent} (mode {root:04o})"
        yield problem("access", text, f"chmod go-w {folder.parent}")
    strangers = sorted(f.name for f in folder.iterdir() if _owner_and_mode(f)[0] != owner)
    if strangers:
        text = f"files belong to another user than the folder: {listed(strangers)}"
        yield problem("access", text, "look at who wrote them, and at config.yaml, before a resume")


def _mode(path: Path) -> int:
    return _owner_and_mode(path)[1]


def _owner_and_mode(path: Path) -> tuple[int, int]:
    """A file's owner and mode; for one that is gone, this user and a mode of 0."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return os.geteuid(), 0
    return status.st_uid, stat.S_IMODE(status.st_mode)
