"""The tables of rollout backends and of sampling schemes."""

from typing import get_args, get_type_hints

from engine.config.sections.rollout import RolloutConfig
from engine.train.rollout.backend import BACKENDS
from engine.train.rollout.sampling import SCHEMES


def test_the_engine_key_takes_the_backends_of_the_table_and_no_others():
    assert get_args(get_type_hints(RolloutConfig)["engine"]) == tuple(BACKENDS)


def test_the_sampling_key_takes_the_schemes_of_the_table_and_no_others():
    assert get_args(get_type_hints(RolloutConfig)["sampling"]) == tuple(SCHEMES)
