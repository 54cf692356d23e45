"""Parameters of tests of which every change runs some, and `make test-all` runs all."""

import pytest


def some_of(variants, *every_time):
    """The parameters of a test: the names in `every_time` are run by `make test` as well.

    `variants` has the value of each by its name; those that are run every time should together
    have every part that the test is about.
    """
    unknown = set(every_time) - variants.keys()
    assert not unknown, f"no such variants: {unknown}"
    return [
        pytest.param(value, id=name, marks=() if name in every_time else pytest.mark.slow)
        for name, value in variants.items()
    ]
