"""A cache of the tokens of large data sets.

An entry is a folder with `prompts.arrow` (:data:`~engine.train.data.prompt_table.SCHEMA`), `rows`
(the data set as `datasets` saves it) and `entry.json`, which is written last and makes it complete.
Its name is a hash of everything that determines its contents, so an entry is never out of date. An
entry that is deleted is made again when it is needed.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import msgspec
import pyarrow as pa

from engine.errors import SessionError, UserInputError
from engine.examined import examined
from engine.session.access import (
    FILE_MODE,
    FOLDER_MODE,
    make_folders,
    private_temporary_folder,
    user_folder,
)
from engine.session.folder import write_atomically
from engine.session.temporary_folders import TemporaryFolder
from engine.train.data.prompt_table import PromptTable

log = logging.getLogger("engine")

VERSION = "1"
"""Version of the entries, part of their names."""
PROMPTS, ROWS, ENTRY = "prompts.arrow", "rows", "entry.json"
UNUSED_SECONDS = 60 * 86400.0
"""Seconds without use after which an entry is removed when another one is made."""


class CacheWriteError(UserInputError):
    """The cache cannot be written."""


class Entry(msgspec.Struct, frozen=True):
    """The contents of `entry.json`."""

    files: dict[str, int]
    """Path of each file in the entry → its bytes. A file of another size is damaged."""


def cache_folder(configured: str | None) -> Path:
    """The folder of the cache: `data.cache`, or one in the user's cache folder."""
    if configured is not None:
        return Path(configured)
    return user_folder("XDG_CACHE_HOME", ".cache") / "prompts"


def content_hash(files: Iterable[Path], *facts: str) -> str:
    """Returns the name of an entry: a hash of the contents of files and of facts.

    Reads about a gigabyte in a second.

    Raises:
        UserInputError: a file cannot be read.
    """
    found = hashlib.blake2b(digest_size=20)
    for fact in (VERSION, *facts):
        found.update(f"{len(fact)}:{fact}".encode("utf-8", "surrogatepass"))
    for path in files:
        try:
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, hashlib.blake2b).digest())
        except OSError as error:
            raise UserInputError(f"data.prompts: cannot read {path}: {error.strerror}") from error
    return found.hexdigest()


class PromptCache:
    """The cache in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str) -> Path | None:
        """The folder of a complete entry of this user; None if there is none.

        Entries of other users are not used, since whoever writes an entry decides what a run is
        trained on.
        """
        folder = self.folder / name
        try:
            entry = msgspec.json.decode((folder / ENTRY).read_bytes(), type=examined(Entry))
            status = folder.lstat()
            sizes = {file: (folder / file).stat().st_size for file in entry.files}
        except (OSError, msgspec.DecodeError):
            return None
        if status.st_uid != os.geteuid() or sizes != entry.files:
            log.warning("%s is damaged or belongs to another user: it is made again", folder)
            return None
        with contextlib.suppress(OSError):  # a cache that is read-only
            os.utime(folder)
        return folder

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A context with a temporary folder in the cache, which becomes the entry at its end.

        If another run has made the entry in the meantime, that entry is kept.

        Raises:
            CacheWriteError: the cache cannot be written. Errors of the context pass through.
        """
        try:
            make_folders(self.folder)
            self._remove_unused()
            work = TemporaryFolder(self.folder)
        except (OSError, SessionError) as error:
            raise self.not_writable(error) from error
        try:
            made = work.path / "entry"
            made.mkdir(mode=FOLDER_MODE)
            yield made
            try:
                self._finish(made, self.folder / name)
            except OSError as error:
                raise self.not_writable(error) from error
        finally:
            work.close()

    def not_writable(self, error: Exception) -> CacheWriteError:
        """Builds the error for a cache that cannot be written."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return CacheWriteError(
            f"data.cache: cannot write in {self.folder}: {reason}; name another folder"
        )

    def _finish(self, made: Path, target: Path) -> None:
        files = sorted(path for path in made.rglob("*") if path.is_file())
        for path in made.rglob("*"):
            path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)
        entry = Entry({str(path.relative_to(made)): path.stat().st_size for path in files})
        write_atomically(made / ENTRY, msgspec.json.encode(entry).decode())
        try:
            made.rename(target)
        except OSError:  # an entry of another run that was faster, or a damaged one
            if self.find(target.name) is None:
                shutil.rmtree(target, ignore_errors=True)
                made.rename(target)

    def _remove_unused(self) -> None:
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):
                status = folder.lstat()
                mine = status.st_uid == os.geteuid() and (folder / ENTRY).is_file()
                if mine and time.time() - status.st_mtime > UNUSED_SECONDS:
                    shutil.rmtree(folder)


class PromptCaches:
    """The folders in which entries are searched, and the one in which new ones are made.

    This is one folder, unless the one in the user's cache folder cannot be written, such as on a
    machine where the user has no home. Then a private folder under `$TMPDIR` is the second one.
    """

    def __init__(self, configured: str | None) -> None:
        """Touches no file.

        Args:
            configured: `data.cache`; a folder that the user has named is the only one.
        """
        self._configured = configured
        self._first = PromptCache(cache_folder(configured))

    def find(self, name: str) -> Path | None:
        """The folder of a complete entry of this user; None if there is none."""
        found = self._first.find(name)
        return found if found or self._second is None else self._second.find(name)

    @property
    def for_writing(self) -> PromptCache:
        """The cache in which entries are made."""
        return self._second or self._first

    @cached_property
    def _second(self) -> PromptCache | None:
        """The second folder. None if it is not needed, or if it cannot be written, either.

        The latter is logged once.
        """
        if self._configured is not None:
            return None
        try:
            make_folders(self._first.folder)
            tempfile.TemporaryFile(dir=self._first.folder).close()
        except OSError as error:
            try:
                second = private_temporary_folder() / self._first.folder.name
            except OSError:
                return None
            log.warning(
                "cannot write in %s (%s): the tokens of large data sets are kept in %s until the "
                "machine is restarted; data.cache names another folder",
                self._first.folder, error.strerror, second,
            )  # fmt: skip
            return PromptCache(second)
        return None


def open_entry(folder: Path, *, rows: bool) -> PromptTable:
    """Memory-maps an entry.

    Args:
        folder: from :meth:`PromptCache.find`.
        rows: whether the rows are needed, as on rank 0.
    """
    data = None
    if rows:
        import datasets  # noqa: PLC0415 - slow, and only rank 0 needs it

        data = datasets.load_from_disk(str(folder / ROWS))
    return PromptTable.read(folder / PROMPTS, data)


WRITE_ERRORS = (OSError, pa.ArrowException)
"""Raised by writing an entry if the disk is full or the folder is not writable."""
