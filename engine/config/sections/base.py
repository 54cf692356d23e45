"""The types that sections share: bounded numbers, and the base class."""

from typing import Annotated

from msgspec import Meta, Struct

# Every number has two bounds. They admit any value that a person could mean and exclude values that
# overflow or make a step endless.
Positive = Annotated[float, Meta(ge=1e-12, le=1e12)]
NonNegative = Annotated[float, Meta(ge=0, le=1e12)]
Coefficient = Annotated[float, Meta(ge=0, le=1e6)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]
Bounded = Annotated[float, Meta(ge=-1e6, le=1e6)]
Seconds = Annotated[float, Meta(ge=1e-9, le=1e9)]
Count = Annotated[int, Meta(ge=1, le=10**12)]
Whole = Annotated[int, Meta(ge=0, le=10**12)]

# Texts that engine.config.paths makes absolute: a key of another type that holds a path would be
# relative to the folder in which the engine was started.
PathOrName = Annotated[str, Meta(extra={"path": "path or name"})]
"""A path if it looks like one, otherwise a name, such as the id of a model on the hub."""
LinkPath = Annotated[str, Meta(extra={"path": "link"})]
"""A path whose links are not followed, such as the Python of a virtual environment."""
Program = Annotated[str, Meta(extra={"path": "program"})]
"""The name of a program to be found in `$PATH`, or its path if it has a slash."""


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the sections."""
