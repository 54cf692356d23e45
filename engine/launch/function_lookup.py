"""Looks for a user's function without importing its module, which may be slow or have effects."""

import ast
import difflib
import importlib.util
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from engine.errors import ConfigError


def check_function(key: str, function: str, folder: str | None, what: str = "function") -> None:
    """Checks that a module exists, and a function in it if its file is one of the user's folders.

    The rank that calls the function imports it, and says whatever else is wrong.

    Args:
        key: of the function in the configuration, for errors.
        function: `module:function`.
        folder: searched for the module before the working directory; None for no other.
        what: it may be, for errors.

    Raises:
        ConfigError: there is no such module, its file is named instead, or the file cannot define
            such a function.
    """
    module, _, name = function.partition(":")
    if module.endswith(".py"):
        file = Path(module)
        where = f" and {key.partition('.')[0]}.path={file.parent}" if "/" in module else ""
        raise ConfigError(
            f"{key} takes the name of a module, not of a file: {file.stem}:{name}{where}"
        )
    folders = [folder, "."] if folder else ["."]
    spec = _own_module(module, folders)
    if spec is None:
        if not _installed(module):
            places = " or ".join(dict.fromkeys(str(Path(place).absolute()) for place in folders))
            raise ConfigError(
                f"{key}: no module '{module}' in {places}, and none with this name is installed"
            )
        return
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    names = _names_in(key, Path(spec.origin))
    if names is not None and name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{module}:{near[0]}'?" if near else ""
        raise ConfigError(f"{key}: {spec.origin} has no {what} '{name}'{hint}")


def _own_module(module: str, folders: list[str]) -> ModuleSpec | None:
    """The module in the user's folders; None if it is not there."""
    importlib.invalidate_caches()  # the file may have been written a moment ago
    places: list[str] | None = folders
    spec = None
    for part in module.split("."):
        if places is None:
            return None
        spec = PathFinder.find_spec(part, places)  # a dotted name would need imported parents
        if spec is None:
            return None
        found = spec.submodule_search_locations
        places = None if found is None else list(found)
    return spec


def _installed(module: str) -> bool:
    """Whether the package that a module belongs to is installed."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # such as __main__, which has no spec
        return True


def _names_in(key: str, file: Path) -> list[str] | None:
    """The names that a module's file binds; None if only running it can tell.

    Raises:
        ConfigError: it is not Python.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # they are for when it is imported
            tree = ast.parse(file.read_bytes())
    except OSError:
        return None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{file}, line {line}" if line else f"{file}"
        raise ConfigError(f"{key}: {where}: {getattr(error, 'msg', error)}") from None
    names = list(_bound(tree))
    return None if {"*", "__getattr__", "globals"} & set(names) else names


def _bound(tree: ast.Module) -> Iterator[str]:
    """The names that statements of a module bind, at any depth, and `globals` if it is used."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
            case ast.Name(ctx=ast.Store()) | ast.Name(id="globals"):
                yield node.id
