"""Values as JSON can hold them."""

import math
from typing import Any

Json = dict[str, Any]
"""An object for scripts: its keys are a contract, its values whatever JSON can hold."""


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null, here and in every list and mapping below."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
