"""Values that JSON can represent."""

import math
from typing import Any

import msgspec

from engine.errors import JournalError, first_line
from engine.examined import examined

Json = dict[str, Any]
"""An object in JSON output. Its keys are a contract with scripts."""


def finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON lacks, by None, also in nested lists and mappings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def decoded(text: str | bytes, kind: Any) -> Any:
    """Decodes JSON of a journal as a type.

    Raises:
        JournalError: it is not JSON, or not of that type: the file is damaged.
    """
    try:
        return msgspec.json.decode(text, type=examined(kind))
    except (msgspec.DecodeError, RecursionError, TypeError, UnicodeError) as error:
        raise JournalError(
            f"the journal is damaged, a value in it cannot be read: {first_line(error)}; restore "
            "the session's files from a copy"
        ) from error
