"""Damage at every structure boundary of every file of a session.

A damage is survived if every command that reads says what it says in one line, without a traceback,
and either nothing that is read has changed or `rlhf-tui verify` finds the damage.
"""

import contextlib
import io
import json
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import RlhfError
from engine.journal.judgements.labels import LabelReader
from engine.journal.reader import JournalReader
from engine.launch import start as launch
from engine.launch.start_checkpoints import timeline_checkpoints
from engine.session import access
from engine.session.folder import SessionFolder
from engine.verification.verify import verify
from rlhf_tui import cli
from tests.faults.lab import DATA, LostError
from tests.faults.table import Table

VERBS = ("status", "metrics", "samples", "events", "verify", "logs")
SQLITE_FIELDS = (0, 16, 18, 19, 20, 21, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 68, 92, 96, 100)
"""Offsets of the fields of a database's header (https://sqlite.org/fileformat2.html), and the first
byte of its first page."""
WAL_FIELDS = (0, 4, 8, 12, 16, 20, 24, 28)
FRAME_FIELDS = (0, 4, 8, 12, 16, 20, 24)
WAL_HEADER, FRAME_HEADER = 32, 24
MOST = 12
"""Boundaries of one kind in one file."""


class Damage(NamedTuple):
    """One change of one file."""

    file: str
    what: str
    apply: Callable[[Path], None]
    as_by_crash: bool = False
    """Whether it leaves what a crash may leave, too: a write-ahead log without its newest rows."""


def flip(at: int) -> Callable[[Path], None]:
    """Inverts the byte at an offset."""

    def apply(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0xFF
        path.write_bytes(data)

    return apply


def cut(at: int) -> Callable[[Path], None]:
    """Ends the file at an offset."""
    return lambda path: path.write_bytes(path.read_bytes()[:at]) and None


def zero(at: int, length: int) -> Callable[[Path], None]:
    """Overwrites with zeros."""

    def apply(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at : at + length] = bytes(len(data[at : at + length]))
        path.write_bytes(data)

    return apply


def replace(content: bytes) -> Callable[[Path], None]:
    """Another content."""
    return lambda path: path.write_bytes(content) and None


def as_folder(path: Path) -> None:
    """A folder in place of the file."""
    path.unlink()
    path.mkdir()


def spread(offsets: list[int]) -> list[int]:
    """At most MOST of them, first and last included."""
    step = max(1, (len(offsets) + MOST - 2) // (MOST - 1))
    return sorted({*offsets[::step], *offsets[-1:]})


def boundaries(path: Path) -> list[int]:
    """The offsets at which a structure of a file begins."""
    data = path.read_bytes()
    if path.suffix == ".db" and data:
        page = struct.unpack_from(">H", data, 16)[0] or 4096
        page = 65536 if page == 1 else page
        pages = [at + part for at in range(page, len(data), page) for part in (0, 3, 5, 8)]
        return [*SQLITE_FIELDS, *spread(pages)]
    if path.name.endswith("-wal") and data:
        page = struct.unpack_from(">I", data, 8)[0]
        frames = spread(list(range(32, len(data) - 24, page + 24)))
        return [*WAL_FIELDS, *(at + f for at in frames for f in FRAME_FIELDS)]
    if path.suffix == ".safetensors":
        header = struct.unpack_from("<Q", data)[0]
        tokens = [8 + m.start() for m in re.finditer(rb'[{}\[\]:,"]', data[8 : 8 + header])]
        return [*range(8), *spread(tokens), 8 + header, len(data) - 1]
    if path.suffix in (".json", ".yaml"):
        return spread([m.start() for m in re.finditer(rb'[{}\[\]:,"\n]', data)])
    return [0, len(data) - 1] if data else []


def last_frame(path: Path) -> int:
    """Where the last frame of a write-ahead log begins; the size of any other file."""
    size = path.stat().st_size
    if not path.name.endswith("-wal") or size < WAL_HEADER:
        return size
    page = struct.unpack_from(">I", path.read_bytes(), 8)[0]
    return size - (page + FRAME_HEADER)


def damages(folder: Path) -> Iterator[Damage]:
    """Every damage of every file of a session."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        name = str(path.relative_to(folder))
        if "tokenizer" in name or name.endswith("-shm"):
            continue
        size, last, log = path.stat().st_size, last_frame(path), name.endswith("-wal")
        for at in boundaries(path):
            yield Damage(name, f"byte {at} inverted", flip(at), at >= last)
            yield Damage(name, f"cut at {at}", cut(at), log)
        noise = bytes(range(256)) * 16
        yield Damage(name, "empty", replace(b""), log)
        yield Damage(name, "noise", replace(noise), log)
        not_text = replace(b"\x00\xff\xfe\x1b[31m\n")
        yield Damage(name, "NUL and bytes that are no UTF-8", not_text, log)
        yield Damage(name, "first half zeros", zero(0, size // 2), log)
        yield Damage(name, "gone", Path.unlink, log)
        yield Damage(name, "a folder", as_folder, log)


def content(session: SessionFolder) -> dict[str, Any]:
    """What readers see of a session."""
    with JournalReader(session) as reader, LabelReader(session) as labels:
        return {
            "metrics": [row.as_json() for row in reader.metrics.rows()],
            "commands": [c.as_json() for c in reader.commands()],
            "events": [e.as_json() for e in reader.events()],
            "samples": [s.as_json() for s in reader.samples.newest()],
            "labels": [str(key) for key in labels.judgements()],
            "checkpoints": timeline_checkpoints(session),
            "config": str(session.config()),
        }


def run_cli(*words: str) -> tuple[int, str, str]:
    """Runs the command line in this process: exit code, stdout, stderr."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["rlhf-tui", *words]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def check(session: SessionFolder, before: dict[str, Any], *, shorter: bool) -> None:
    """Raises LostError if a damaged session is read with a traceback or silently differs.

    Args:
        session: damaged.
        before: its content before.
        shorter: whether a write-ahead log was cut or removed, or its last frame harmed.
    """
    for verb in VERBS:
        try:
            code, _, err = run_cli(verb, session.name, "--sessions", str(session.folder.parent))
        except Exception as error:
            raise LostError(f"{verb} raises {error!r}") from error
        if code not in (0, 1, 2, 3) or err.count("\n") > 1 or "Traceback" in err:
            raise LostError(f"{verb} ends with {code}: {err}")
    if not session.config_file.is_file():
        return  # no session: a missing config.yaml is told as such
    found = verify(session)
    try:
        now = content(session)
    except RlhfError:
        now = {}
    # Nothing else tells that a session had labels, or that its newest rows, which a crash leaves
    # in a write-ahead log, were more than there are.
    unknowable = {"labels"} if not session.labels_file.exists() else set()
    if shorter:
        unknowable |= set(before)
    if {k for k in before if now.get(k) != before[k]} - unknowable and not found.findings:
        different = [key for key in before if now.get(key) != before[key]]
        raise LostError(f"{different} differ and verify finds nothing")
    with contextlib.suppress(RlhfError):
        launch.resume(session, from_step=None, reseed=False, overrides=[], who="faults")


def old_session(root: Path, name: str) -> SessionFolder:
    """A copy of a recorded session whose configuration names files that are."""
    folder = root / "old" / name
    access.make_folders(folder.parent)  # verify would find that a group can write there
    shutil.copytree(DATA / "sessions" / name, folder)
    folder.chmod(0o700)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("@FOLDER@", str(DATA)))
    with contextlib.suppress(FileNotFoundError):
        (folder / "engine.json").unlink()
    session = SessionFolder(folder)
    session.write_config(session.config())  # as now, with its last line
    return session


def corrupt_everything(
    root: Path, table: Table, stride: int = 1, first: int = 0, only: str = ""
) -> None:
    """Damages two sessions, one of which crashed with its newest rows in a write-ahead log.

    Args:
        root: folder for the copies.
        table: counts by kind of file.
        stride: do every so manieth damage.
        first: the first one.
        only: a part of the names of the damages that are done, as in `config.yaml: cut`.
    """
    access.make_folders(root / "damaged")
    for name in ("finished", "killed"):
        original = old_session(root, name)
        for number, damage in enumerate(damages(original.folder)):
            if number % stride != first % stride or only not in f"{damage.file}: {damage.what}":
                continue
            session = SessionFolder(root / "damaged" / name)
            shutil.rmtree(session.folder, ignore_errors=True)
            shutil.copytree(original.folder, session.folder)
            before = json.loads(json.dumps(content(session)))
            shutil.rmtree(session.folder)
            shutil.copytree(original.folder, session.folder)
            damage.apply(session.folder / damage.file)

            def checked(
                session: SessionFolder = session,
                before: dict[str, Any] = before,
                shorter: bool = damage.as_by_crash,
            ) -> None:
                check(session, before, shorter=shorter)

            kind = f"damage: {re.sub(r'.*/', '', damage.file)}"
            table.count(kind, f"{name}/{damage.file}: {damage.what}", checked)
