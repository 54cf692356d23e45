"""The benchmarks that replace pieces of the engine name pieces that exist."""

import pkgutil

import pytest

from benchmarks import learning

REPLACED = sorted(
    {
        name
        for _, variants in learning.TASKS.values()
        for variant in variants
        for undone in variant
        for name in undone.instead
    }
)


@pytest.mark.parametrize("name", REPLACED)
def test_what_the_learning_benchmark_replaces_is_used_under_that_name(name):
    assert callable(pkgutil.resolve_name(name))
