"""Writes a configuration with a comment above each key: the first sentence of its description."""

import ast
import inspect
import re
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any, get_type_hints

import msgspec

from engine.config.schema import RunConfig
from engine.config.yaml_document import dump_yaml

WIDTH = 96
"""Columns of a comment."""


def commented(tree: dict[str, dict[str, Any]]) -> str:
    """YAML with the sections and keys of `tree`, in their order, each key with its comment."""
    kinds = get_type_hints(RunConfig)
    return "\n".join(
        "\n".join([f"{section}:", *_keys(values, kinds[section], "  ")])
        for section, values in tree.items()
    )


def _keys(values: dict[str, Any], kind: Any, indent: str) -> list[str]:
    lines: list[str] = []
    described = descriptions(kind)
    inner = get_type_hints(kind)
    for key, value in values.items():
        if comment := described.get(key):
            lines += textwrap.wrap(
                comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
        nested = inner.get(key)
        if isinstance(value, dict) and _is_section(nested):
            lines += [f"{indent}{key}:", *_keys(value, nested, f"{indent}  ")]
        else:
            lines += textwrap.indent(dump_yaml({key: value}), indent).splitlines()
    return lines


@cache
def descriptions(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The first sentence about each key of a section, by key; of its base classes too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not issubclass(base, msgspec.Struct) or base is msgspec.Struct:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for node, after in pairwise(statements):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = _first_sentence(_text(after))
    return found


def _is_section(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, msgspec.Struct)


def _text(node: ast.stmt) -> str:
    """The text of a statement that is nothing but a string; empty for any other."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def _first_sentence(text: str) -> str:
    first = re.split(r"(?<!\bDr)\.\s+(?=[A-Z])", " ".join(text.split()))[0]
    return first.rstrip(".").replace("`", "") + "." if first else ""
