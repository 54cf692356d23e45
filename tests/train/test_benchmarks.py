"""The functions that the learning benchmark replaces exist."""

import pkgutil

import pytest

from benchmarks import learning

REPLACED = sorted(
    {
        name
        for _, variants in learning.TASKS.values()
        for variant in variants
        for ablation in variant
        for name in ablation.replacements
    }
)


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_function_exists_under_its_dotted_name(name):
    assert callable(pkgutil.resolve_name(name))
