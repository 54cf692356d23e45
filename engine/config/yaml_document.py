"""Reads and writes YAML documents of plain values: text, numbers, lists and sections of keys.

A document may come from anyone: no tag runs code, aliases cannot make it explode, and any mistake
raises a ConfigError of one line.
"""

import contextlib
import datetime
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from engine.config.type_errors import shown
from engine.errors import ConfigError

MAX_DEPTH = 50
"""Maximum depth of nested sections and lists."""
MAX_VALUES = 20_000
"""Maximum number of values in a document. An alias counts with everything that it expands to."""
MAX_FAST_LEVELS = 2_000
"""Levels of a document that libyaml may read. It reads 10,000; 30,000 end the process."""
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What PyYAML raises for a value that does not fit its tag, such as `2020-13-45` or `!!int ''`, and
for a thousand brackets."""
_MERGE = "tag:yaml.org,2002:merge"
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)
"""1e-5 is a number. In YAML 1.1 it is text."""


class _Limits(yaml.constructor.SafeConstructor):
    """Limits what merge keys (`<<`) expand to, and rejects duplicate keys."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts the keys that merge keys stand for into a mapping, each key once.

        PyYAML's own leaves a key's overridden values in the mapping, and from `<<: [*a, *b]` 6.0.4
        takes b's value of a key that both have. By YAML's specification it is a's.
        """
        _check_repeats(node)
        merges = [value for key, value in node.value if key.tag == _MERGE]
        # Before the mappings are read that are merged: one may be this one.
        node.value = [(key, value) for key, value in node.value if key.tag != _MERGE]
        super().flatten_mapping(node)
        known = {_identity(key) for key, _ in node.value}
        for merge in reversed(merges):
            for source in merge.value if isinstance(merge, yaml.SequenceNode) else [merge]:
                if not isinstance(source, yaml.MappingNode):
                    problem = f"expected a mapping or list of mappings, but found {source.id}"
                    raise yaml.constructor.ConstructorError(None, None, problem, source.start_mark)
                self.flatten_mapping(source)
                for key, value in source.value:
                    if _identity(key) not in known:
                        known.add(_identity(key))
                        node.value.append((key, value))
        if len(node.value) > MAX_VALUES:
            raise ConfigError("merge keys (<<) expand to too many keys")


def _identity(key: yaml.Node) -> Hashable:
    return key.value if isinstance(key, yaml.ScalarNode) else id(key)


def _check_repeats(node: yaml.MappingNode) -> None:
    """Raises ConfigError if a mapping has a key twice: YAML would take the second value."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                where = f"line {line}" if first == line else f"lines {first} and {line}"
                raise ConfigError(f"{shown(key.value)} is given twice, in {where}")
            lines[key.value] = line


class _Loader(_Limits, yaml.SafeLoader):
    """PyYAML's safe loader in Python, whose errors say what is wrong."""


_FastLoader = _Loader
"""The same over libyaml where PyYAML has it: 3 ms instead of 22 for a session's configuration."""
if yaml.__with_libyaml__:

    class _FastLoader(_Limits, yaml.CSafeLoader):  # type: ignore[no-redef] # this or the other
        pass


class _Dumper(yaml.SafeDumper):
    """Writes text that :class:`_Loader` would take for a number in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


_Loader.add_implicit_resolver(*_FLOAT)
_FastLoader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


def parse_yaml(text: str, where: str, key: str = "") -> Any:
    """Parses a YAML document.

    Args:
        text: the document.
        where: its origin, for the error message.
        key: the configuration key whose value it is, if it is only that.

    Raises:
        ConfigError: the text is not a YAML document, or holds more than plain values.
    """
    try:
        tree = _load(text)
        check_plain(tree, key)
    except ConfigError as error:
        raise error if key else ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not a YAML document"
        if "'\\t'" in problem:
            problem = "a tab, where YAML only takes spaces"
        raise ConfigError(f"{where}{line}: {problem}") from error
    except _MALFORMED as error:
        raise ConfigError(f"{where}: {_malformed(error)}") from error
    return tree


def _load(text: str) -> Any:
    # libyaml's recursion is in C: from some ten thousand levels on it ends the process. A line of n
    # characters opens fewer than 2 n levels, and each bracket one wherever it stands.
    levels = 2 * max(map(len, text.splitlines()), default=0) + text.count("[") + text.count("{")
    if levels < MAX_FAST_LEVELS:
        with contextlib.suppress(yaml.YAMLError, ValueError):
            return yaml.load(text, Loader=_FastLoader)  # noqa: S506 - a SafeLoader
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def dump_yaml(tree: dict[str, Any]) -> str:
    """Writes nested dictionaries of plain values as YAML that :func:`parse_yaml` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _malformed(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, ValueError) and str(error):
        return str(error).splitlines()[0]
    return "a value does not fit its tag"


def check_plain(tree: Any, path: str = "") -> None:
    """Checks that a tree has plain values only: text keys, finite numbers, valid Unicode, no loops.

    Args:
        tree: nested dictionaries and lists.
        path: its place in a configuration, for the error message.

    Raises:
        ConfigError: it has other values; the message names the place.
    """
    values = 0
    waiting: list[tuple[str, Any, int]] = [(path, tree, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        values += 1
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError("the document is too large or contains itself (see its & and *)")
        if isinstance(value, dict):
            for key, child in value.items():
                waiting.append((f"{path}.{_check_key(key, path)}".lstrip("."), child, depth + 1))
        elif isinstance(value, list | tuple | set):
            waiting += [(f"{path}[{i}]", child, depth + 1) for i, child in enumerate(value)]
        else:
            _check_scalar(value, path or "the value")


def _check_key(key: Hashable, path: str) -> str:
    if not isinstance(key, str):
        place = f" in {path}" if path else ""
        raise ConfigError(f"a key must be text, not {shown(key)}{place}")
    _check_scalar(key, "a key")
    return key


def _check_scalar(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number, not {value}")
    if isinstance(value, bytes | datetime.date | datetime.time):
        raise ConfigError(f"{path} must not be {type(value).__name__}; write text in quotes")
    if isinstance(value, str):
        if "\0" in value:
            raise ConfigError(f"{path} contains a NUL character: {shown(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{path} is not valid Unicode text: {shown(value)}") from None
