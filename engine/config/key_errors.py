"""Describes each mistake in a configuration in one sentence that names the dotted key."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from engine.config.names_elsewhere import KEYS_HERE, SECTIONS
from engine.config.schema import RunConfig
from engine.config.type_errors import expected, shown
from engine.examined import examined

EMPTY = ", got `null`"
"""Suffix of msgspec's message for a key without a value."""

LISTED, SHORT = 4, 40
"""How many more unknown keys a message lists, and the characters that each has at most."""


def known_keys() -> list[str]:
    """Every dotted key of a configuration, in the order of the schema."""
    return list(_keys_of(RunConfig, ""))


def _keys_of(section: type[msgspec.Struct], prefix: str) -> Iterable[str]:
    for field in msgspec.structs.fields(section):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _keys_of(field.type, f"{prefix}{field.encode_name}.")
        else:
            yield prefix + field.encode_name


def nearest(key: str) -> str:
    """`; did you mean 'ppo.epochs'?`, or nothing if no key is similar."""
    keys, section = known_keys(), key.rpartition(".")[0]
    if "[" in section:  # an entry of a list
        fields = (f for kind in _types_at(section) for f in getattr(kind, "fields", ()))
        keys = [f"{section}.{field.encode_name}" for field in fields]
    last = key.rpartition(".")[2]
    if "[" not in section and (last in KEYS_HERE or key in SECTIONS):
        here = KEYS_HERE.get(last, "")
        suggestion = f"; did you mean '{here}'?" if here else ""
        if here.rpartition(".")[2] == last:
            return suggestion
        return f"{suggestion} (docs/from-*.md compare keys with those of other libraries)"
    sections = dict.fromkeys(k.rpartition(".")[0] for k in keys if "." in k)
    same_name = [k for k in keys if k.rpartition(".")[2] == last]
    close = "" if "." in key else _most_similar(key, same_name, 0.0)
    close = close or _most_similar(key, [*keys, *sections], 0.5) or "".join(same_name[:1])
    return f"; did you mean '{close}'?" if close else ""


def _most_similar(key: str, among: list[str], least: float) -> str:
    """The most similar text, the first one of several; empty if none is as similar as `least`.

    `difflib.get_close_matches` prefers the last one in the alphabet.
    """
    matcher = difflib.SequenceMatcher(b=key)

    def similarity(text: str) -> float:
        matcher.set_seq1(text)
        return matcher.ratio()

    found = max(among, key=similarity, default="")
    return found if found and similarity(found) >= least else ""


def explain(message: str, tree: dict[str, Any]) -> str:
    """Turns an error message of msgspec into one sentence about a dotted key."""
    text, _, at = message.partition(" - at `$")
    path = at.rstrip("`").lstrip(".")
    if match := re.search(r"unknown field `(.+)`", text):
        key = f"{path}.{match[1]}" if path else match[1]
        colon = "; YAML takes `key: value`, with a space after the colon" if ":" in match[1] else ""
        return f"unknown key '{key}'{colon or nearest(key)}{_also_unknown(tree, key)}"
    if match := re.search(r"missing required field `(.+)`", text):
        key = f"{path}.{match[1]}" if path else match[1]
        kind = "section" if key in ("model", "data", "reward") else "key"
        return f"the {kind} '{key}' is required, but missing"
    wanted = expected(text)
    value = _lookup(tree, path)
    choices = _choices(path)
    if choices and ("enum" in text or not wanted):
        wanted = "one of " + ", ".join(choices)
    if text.endswith(EMPTY):  # `key:` in YAML, `key=` on the command line
        return f"{path} is empty; it must be {wanted}"
    return f"{path} must be {wanted}, not {shown(value)}"


def _also_unknown(tree: dict[str, Any], told: str) -> str:
    """The other unknown keys, so that they need not be found one by one; without long ones."""
    others = [k for k in _unknown_keys(RunConfig, tree, "") if k != told and len(k) <= SHORT]
    if not others:
        return ""
    listed = ", ".join(f"'{key}'" for key in others[:LISTED])
    return f" (also unknown: {listed}{' and others' if len(others) > LISTED else ''})"


def _unknown_keys(section: type[msgspec.Struct], given: Any, prefix: str) -> Iterable[str]:
    """The dotted keys of a tree that no section has, outside of lists."""
    if not isinstance(given, dict):
        return
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(section)}
    for name, value in given.items():
        if name not in fields:
            yield f"{prefix}{name}"
        elif isinstance(kind := fields[name], type) and issubclass(kind, msgspec.Struct):
            yield from _unknown_keys(kind, value, f"{prefix}{name}.")


def _parts(path: str) -> list[str]:
    """The keys and indices of a dotted key: `reward.mix[0].weight`."""
    return re.findall(r"[^.\[\]]+", path)


def _lookup(tree: Any, path: str) -> Any:
    for part in _parts(path):
        try:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return tree


def _types_at(path: str) -> list[Any]:
    """The types that the value of a key may have, as msgspec describes them."""
    kinds: list[Any] = [msgspec.inspect.type_info(examined(RunConfig))]
    for part in _parts(path):
        if part.isdigit():
            found = next((k.item_type for k in kinds if hasattr(k, "item_type")), None)
        else:
            fields = (f for kind in kinds for f in getattr(kind, "fields", ()))
            found = next((f.type for f in fields if f.encode_name == part), None)
        kinds = [found, *getattr(found, "types", ())]
    return kinds


def _choices(path: str) -> list[str]:
    """The allowed values of a key that is an enumeration; empty for any other key."""
    kinds = _types_at(path)
    values = [str(v) for kind in kinds for v in getattr(kind, "values", ())]
    numbers = any(isinstance(kind, msgspec.inspect.IntType) for kind in kinds)
    return [*(["a whole number"] if values and numbers else []), *values]
