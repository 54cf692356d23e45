"""A function or class of the user's, imported by its name and called within the rank."""

import contextlib
import importlib
import inspect
import io
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from engine.errors import UserInputError, error_text
from engine.launch.parent_death import let_children_be_terminated
from engine.session.file_signature import FileSignature, file_signature
from engine.train.user_code.errors import user_line

STANDARD_LIBRARY = (sysconfig.get_path("stdlib"), sysconfig.get_path("stdlib") + "/lib-dynload")
"""Its folders on the import path: of modules in Python, and of those in C."""
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class UserFunction:
    """A callable of a user's module.

    After a call that raised, or whose result could not be used, the module is reloaded if its file
    has changed, so that it can be fixed while the run is paused. Modules that it imports are not
    reloaded.
    """

    def __init__(self, source: str, path: str | None, key: str) -> None:
        """Imports it.

        Args:
            source: `module:name`.
            path: a folder to import the module from; the working directory is searched after it.
            key: the configuration key, for errors.

        Raises:
            UserInputError: the module cannot be imported, or has no such function.
        """
        let_children_be_terminated()
        self._source, self._key = source, key
        self._failed = False
        module_name = source.partition(":")[0]
        self._folders = [path, "."] if path else ["."]
        try:
            with _imported_from(self._folders), _own_streams(), _restored_torch_settings():
                self._module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            # A user's module may raise anything on import; the user gets it on one line.
            raise UserInputError(
                f"{key}: cannot import '{module_name}' (looked in {path or '.'}): "
                f"{type(error).__name__}: {error_text(error)}{user_line(error)}"
            ) from error
        self._signature = self._file_signature()
        self._find()

    def _find(self) -> None:
        """Looks the function up in its module. Raises UserInputError."""
        module_name, _, name = self._source.partition(":")
        function = getattr(self._module, name, None)
        if not callable(function):
            raise UserInputError(f"{self._key}: module '{module_name}' has no function '{name}'")
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        self._accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._accepted = {p.name for p in parameters}
        self._required = [
            p.name for p in parameters if p.default is p.empty and p.kind not in VARIADIC
        ]

    def result_was_unusable(self) -> None:
        """Lets the next call reload the module if its file has changed, as after an error."""
        self._failed = True

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        return self._function

    def _file_signature(self) -> FileSignature:
        """Returns the signature of the module's file; () if there is no file."""
        file = getattr(self._module, "__file__", None)  # none for a module that is built in
        return () if file is None else file_signature(Path(file))

    def _reload_if_changed(self) -> None:
        """Imports a changed file again. Raises whatever the file raises."""
        if (found := self._file_signature()) and found != self._signature:
            with _imported_from(self._folders), _own_streams(), _restored_torch_settings():
                self._module = importlib.reload(self._module)
            self._find()
            self._signature = found

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Context manager in which code of the module runs, without effects on the rank.

        Reloads the module first if the last call failed and the file has changed.
        """
        if self._failed:
            self._reload_if_changed()
        self._failed = True
        with forks_ended(), _own_streams(), _restored_torch_settings():
            yield
        self._failed = False

    def call(self, arguments: dict[str, Any]) -> Any:
        """Calls the function with those keyword arguments that it takes.

        Raises:
            TypeError: it needs others.
            Exception: what it raises.
        """
        if absent := [name for name in self._required if name not in arguments]:
            raise TypeError(f"it takes '{absent[0]}', which is not one of {', '.join(arguments)}")
        if not self._accepts_any:
            arguments = {k: v for k, v in arguments.items() if k in self._accepted}
        return self._function(**arguments)


@contextlib.contextmanager
def _imported_from(folders: list[str]) -> Iterator[None]:
    """Context manager in which these folders are searched first for modules.

    Afterwards they are searched before installed packages, so that the function's own imports work,
    but after the standard library: nothing else must import a `random.py` next to the function.
    """
    _search(folders, at=0)
    try:
        yield
    finally:
        others = [folder for folder in sys.path if folder not in folders]
        library = [i for i, folder in enumerate(others) if folder in STANDARD_LIBRARY]
        _search(folders, at=max(library, default=-1) + 1)


def _search(folders: list[str], at: int) -> None:
    others = [folder for folder in sys.path if folder not in folders]
    sys.path[:] = [*others[:at], *folders, *others[at:]]


TORCH_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
)
"""What reads and what sets each of torch's settings that change a step, or end it with an error."""


@contextlib.contextmanager
def _restored_torch_settings() -> Iterator[None]:
    """Context manager that restores torch's settings, which the function shares with the run."""
    before = [get() for get, _ in TORCH_SETTINGS]
    try:
        yield
    finally:
        for (get, change), value in zip(TORCH_SETTINGS, before, strict=True):
            if get() != value:
                change(value)


class _LogFile(io.FileIO):
    """The rank's log. What cannot be written, as on a full disk, is lost: it fails no step."""

    def write(self, data: Any) -> int:
        """Writes bytes, as many as it can; returns their number, or that of all if it failed."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _log_stream(fd: int) -> TextIO:
    """Text in UTF-8, written line by line to a descriptor that stays open."""
    file = io.BufferedWriter(_LogFile(fd, "w", closefd=False))
    return io.TextIOWrapper(file, "utf-8", "backslashreplace", line_buffering=True)


@contextlib.contextmanager
def _own_streams() -> Iterator[None]:
    """Context manager with separate standard output and error objects for the same files.

    The function may close them, and even the file descriptors, while the rank's log needs its own.
    The objects are not closed here, because handlers of the function's loggers may keep them.
    """
    out, error = _log_stream(1), _log_stream(2)
    copies = [os.dup(fd) for fd in (1, 2)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            yield
        finally:
            for fd, copy_of_fd in zip((1, 2), copies, strict=True):
                os.dup2(copy_of_fd, fd)  # a file opened later would get the number of a closed one
                os.close(copy_of_fd)
            for stream in (out, error):
                if not stream.closed:
                    stream.flush()


@contextlib.contextmanager
def forks_ended() -> Iterator[None]:
    """Context manager that processes forked by the function never leave.

    Such a process would continue as a copy of the rank, with its connection to the supervisor.
    """
    rank = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != rank:
            os._exit(1)
