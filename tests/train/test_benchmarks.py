"""The learning benchmark replaces functions of the engine by plain ones of the same result."""

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


def test_plain_versions_of_all_optimised_functions_give_the_same_steps(tmp_path):
    settings = ["rollout.batch_size=8", "rollout.max_new_tokens=12", "log.tensorboard=false"]
    ours, plain = (
        learning.run_scores(tmp_path, seed=0, steps=2, settings=settings, ablations=ablations)
        for ablations in ([], learning.ALWAYS)
    )
    assert plain == pytest.approx(ours, abs=1e-3)
