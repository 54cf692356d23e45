"""Reads plain JSON Lines without `datasets`, whose import takes longer than reading most files.

Whether a file is plain is decided strictly: what is read must equal what `datasets` would return.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

DATE = re.compile(r"\s*\d{4}-\d\d")
"""How text begins that `datasets` may turn into a date."""
LARGEST = 2**63


def read_plain(path: Path) -> list[dict[str, Any]] | None:
    """Reads a file of JSON objects, one a line, with equal keys and one type in each column.

    Returns:
        The rows, at least one; None if the file is not that plain or cannot be read. `datasets`
        reads it then, or finds the error.
    """
    rows: list[dict[str, Any]] = []
    kinds: list[tuple[str, type]] = []
    try:
        with path.open("rb") as file:
            for line in file:
                row = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=_refuse)
                kinds = kinds or [(name, type(value)) for name, value in row.items()]
                if [(name, type(value)) for name, value in row.items()] != kinds:
                    return None
                if not all(map(_is_plain, row.values())):
                    return None
                rows.append(row)
    except (OSError, ValueError, AttributeError, RecursionError):  # among them a row that is a list
        return None
    return rows if kinds else None


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different. Raises ValueError."""
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair raises a ValueError
        return DATE.match(value) is None
    if isinstance(value, int):
        return -LARGEST <= value < LARGEST
    return isinstance(value, float) and math.isfinite(value)
