"""Relative paths in a configuration, which start at the folder of its file."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from engine.config.schema import RunConfig
from engine.examined import examined

DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Extension of a prompt file → name of its format in `datasets`."""
REWARD_SOURCES = ("reward", "reward.mix[]", "eval.rewards[]")


@cache
def path_keys() -> dict[str, str]:
    """Every key that holds a path → its kind, as in :mod:`engine.config.sections.base`.

    `[]` in a key stands for each entry of a list.
    """
    return dict(_path_keys(msgspec.inspect.type_info(examined(RunConfig)), ""))


def _path_keys(kind: Any, key: str) -> Iterator[tuple[str, str]]:
    match kind:
        case msgspec.inspect.StructType():
            for field in kind.fields:
                yield from _path_keys(field.type, f"{key}.{field.encode_name}".removeprefix("."))
        case msgspec.inspect.ListType():
            yield from _path_keys(kind.item_type, f"{key}[]")
        case msgspec.inspect.UnionType():
            for one in kind.types:
                yield from _path_keys(one, key)
        case msgspec.inspect.Metadata():
            if kind.extra is not None and "path" in kind.extra:
                yield key, kind.extra["path"]


def make_paths_absolute(tree: dict[str, Any], folder: Path) -> None:
    """Makes relative paths absolute, in place; ids of models and data sets on the hub stay."""
    absolute = {"path or name": _resolved, "link": _absolute, "program": _program}
    for key, kind in path_keys().items():
        section, _, name = key.rpartition(".")
        for node in _dicts_at(tree, section):
            if isinstance(value := node.get(name), str):
                node[name] = absolute[kind](folder, value)
    sources = [source for section in REWARD_SOURCES for source in _dicts_at(tree, section)]
    for reward in _dicts_at(tree, "reward"):
        if reward.get("path") is None and any(source.get("function") for source in sources):
            reward["path"] = str(folder)
    for environment in _dicts_at(tree, "environment"):
        if environment.get("path") is None and (
            environment.get("factory") or environment.get("tools")
        ):
            environment["path"] = str(folder)


def _dicts_at(tree: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The dictionaries of a dotted key, whose part `mix[]` is each entry of the list `mix`.

    Leaves out anything else, which decoding will refuse.
    """
    found: list[Any] = [tree]
    for part in key.split("."):
        found = [node.get(part.removesuffix("[]")) for node in found]
        if part.endswith("[]"):
            found = [entry for value in found if isinstance(value, list) for entry in value]
        found = [node for node in found if isinstance(node, dict)]
    return found


def _resolved(folder: Path, value: str) -> str:
    """A path from a folder on; anything that does not look like a file of this machine stays."""
    if value.startswith("starter:"):
        return value
    try:
        path = folder / Path(value).expanduser()
        looks_local = (
            value.startswith((".", "~", "/")) or path.exists() or path.suffix in DATA_FILES
        )
        return str(path.resolve()) if looks_local else value
    except (RuntimeError, OSError):
        # No user of that ~NAME; a loop of links; a name that is too long. Whoever opens the
        # file reports it, and the id of a model or data set is not a file at all.
        return value


def _absolute(folder: Path, value: str) -> str:
    """A path from a folder on; links stay, as the Python of a virtual environment is one."""
    try:
        return str((folder / Path(value).expanduser()).absolute())
    except RuntimeError:  # no user of that ~NAME
        return value


def _program(folder: Path, value: str) -> str:
    return _absolute(folder, value) if "/" in value else value
