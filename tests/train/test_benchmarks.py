"""The functions that the benchmarks replace exist in the engine."""

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
def test_each_function_that_the_learning_benchmark_replaces_exists(name):
    assert callable(pkgutil.resolve_name(name))
