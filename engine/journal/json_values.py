"""Values that JSON can represent."""

import math
from typing import Any

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
