"""Describes each mistake in a configuration in one sentence that names the dotted key."""

import copy
import difflib
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from engine.config.mistakes import MAX_LISTED, OTHERS_PREFIX, joined_mistakes
from engine.config.names_elsewhere import KEYS_HERE, SECTIONS
from engine.config.schema import RunConfig
from engine.config.type_errors import expected, shown
from engine.examined import examined

NULL_SUFFIX = ", got `null`"
"""Suffix of msgspec's message for a key without a value."""

MAX_LISTED_KEY = 40
"""Maximum length of each further unknown key that a message lists."""
MAX_MISTAKES = 10
"""Maximum number of mistakes that are looked for."""
REQUIRED_SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"policy": "x"},
    "data": {"prompts": "x"},
    "reward": {},
}
"""What stands for a missing section while the other mistakes are looked for."""


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


def explain(message: str, tree: dict[str, Any], kind: type[msgspec.Struct] = RunConfig) -> str:
    """Turns an error message of msgspec into a sentence about a dotted key, and adds the others.

    Args:
        message: the error of the first mistake.
        tree: the configuration with mistakes, as nested dictionaries.
        kind: what it could not be decoded as.
    """
    found = _mistakes(message, tree, kind)
    return joined_mistakes(sorted(found, key=lambda text: not text.startswith("unknown key")))


def _mistakes(message: str, tree: dict[str, Any], kind: type[msgspec.Struct]) -> Iterable[str]:
    """One sentence for each value that cannot be decoded, and one for all unknown keys.

    msgspec reports one mistake. To find the next one, it is mended in a copy. A key is not said to
    be missing after an unknown one, which is probably that key, nor after its own wrong value.
    """
    rest = copy.deepcopy(tree)
    unknown, reported = False, set[str]()
    for _ in range(MAX_MISTAKES):
        text, path = _text_and_path(message)
        missing = _missing_key(text, path)
        if not (missing and (unknown or missing in reported)):
            yield _explain_one(text, path, rest)
        unknown |= _unknown_field(text) is not None
        reported.add(path)
        if not _mend(text, path, rest):
            return
        try:
            msgspec.convert(rest, examined(kind), strict=True)
        except msgspec.ValidationError as error:
            message = str(error)
        else:
            return


def _mend(text: str, path: str, tree: dict[str, Any]) -> bool:
    """Takes the mistake that msgspec reports out of a tree, in place; returns whether it could."""
    if (field := _unknown_field(text)) is not None:
        places = [(section, name) for section, name, _ in _unknown_keys(RunConfig, tree, "")]
        section = _lookup(tree, path)
        if isinstance(section, dict) and field in section:  # also in a list
            places.append((section, field))
        for section, name in places:
            section.pop(name, None)
        return bool(places)
    missing = _missing_key(text, path)
    *parents, name = _parts(missing or path) or [""]
    section = _lookup(tree, ".".join(parents))
    if not isinstance(section, dict) or not (missing or name in section):
        return False
    if missing:
        section[name] = copy.deepcopy(REQUIRED_SECTIONS.get(missing, "x"))
    else:
        del section[name]
    return True


def _unknown_field(text: str) -> str | None:
    """The name of the unknown key in an error message of msgspec; None for any other message."""
    match = re.search(r"unknown field `(.*)`", text, re.DOTALL)
    return match[1] if match else None


def _missing_key(text: str, path: str) -> str:
    """The dotted key that an error message of msgspec misses; empty for any other message."""
    match = re.search(r"missing required field `(.+)`", text)
    return f"{path}.{match[1]}".lstrip(".") if match else ""


def _text_and_path(message: str) -> tuple[str, str]:
    """The parts of an error message of msgspec: what is wrong, and the dotted key."""
    text, _, at = message.partition(" - at `$")
    return text, at.rstrip("`").lstrip(".")


def _explain_one(text: str, path: str, tree: dict[str, Any]) -> str:
    """One sentence about a dotted key, from an error message of msgspec."""
    if (name := _unknown_field(text)) is not None:
        key = f"{path}.{name}" if path else name
        return f"unknown key '{key}'{_remedy(name, key)}{_also_unknown(tree, key)}"
    if key := _missing_key(text, path):
        kind = "section" if key in ("model", "data", "reward") else "key"
        return f"the {kind} '{key}' is required, but missing"
    wanted = expected(text)
    value = _lookup(tree, path)
    choices = _choices(path)
    if choices and ("enum" in text or not wanted):
        wanted = "one of " + ", ".join(choices)
    if text.endswith(NULL_SUFFIX):  # `key:` in YAML, `key=` on the command line
        return f"{path} is empty; it must be {wanted}"
    return f"{path} must be {wanted}, not {shown(value)}"


def _remedy(name: str, key: str) -> str:
    """What to do about an unknown key, as the end of a sentence; empty if that is not known.

    Args:
        name: of the key in its section.
        key: the dotted key.
    """
    if ":" in name:
        return "; YAML takes `key: value`, with a space after the colon"
    if "." in name and key in known_keys():
        section, _, last = key.rpartition(".")
        return f"; in a file, write '{last}' in the section '{section}'"
    return nearest(key)


def _also_unknown(tree: dict[str, Any], reported: str) -> str:
    """The other unknown keys, so that they need not be found one by one; without long ones."""
    keys = (key for _, _, key in _unknown_keys(RunConfig, tree, ""))
    others = [key for key in keys if key != reported and len(key) <= MAX_LISTED_KEY]
    if not others:
        return ""
    listed = ", ".join(f"'{key}'" for key in others[:MAX_LISTED])
    return f"{OTHERS_PREFIX} unknown: {listed}{' and others' if len(others) > MAX_LISTED else ''})"


def _unknown_keys(
    section: type[msgspec.Struct], given: Any, prefix: str
) -> Iterable[tuple[dict[str, Any], str, str]]:
    """The keys of a tree that no section has, outside of lists and of optional sections.

    Yields:
        The dictionary with the key, its name there, and the dotted key.
    """
    if not isinstance(given, dict):
        return
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(section)}
    for name, value in given.items():
        if name not in fields:
            yield given, name, f"{prefix}{name}"
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
