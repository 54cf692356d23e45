"""By when a run must have saved."""

from datetime import UTC, datetime

import pytest

from engine.config.deadline import deadline
from engine.errors import ConfigError
from tests.engine.demo_config import demo

END = {"SLURM_JOB_END_TIME": "1793500000"}


@pytest.mark.parametrize(
    ("value", "environment", "expected"),
    [
        ("auto", {}, None),
        ("auto", END, 1793500000.0),
        ("auto", {"SLURM_JOB_END_TIME": "0"}, None),
        ("auto", {"SLURM_JOB_END_TIME": "NONE"}, None),
        ("auto", {"SLURM_JOB_END_TIME": "inf"}, None),
        ("null", END, None),
        ("1793500001", END, 1793500001.0),
        ("'2027-01-31 14:05+00:00'", END, datetime(2027, 1, 31, 14, 5, tzinfo=UTC).timestamp()),
        ("2027-01-31T14:05", {}, datetime(2027, 1, 31, 14, 5).astimezone().timestamp()),
    ],
)
def test_it_is_what_the_key_or_the_scheduler_says(value, environment, expected):
    config = demo(f"train.save_before_deadline={value}")
    assert deadline(config.train, environment) == expected


@pytest.mark.parametrize("value", ["soon", "14:05", "5", "'2027-13-01 00:00'", "never"])
def test_what_is_no_time_is_refused_with_an_example(value):
    with pytest.raises(ConfigError, match="2027-01-31 14:05"):
        demo(f"train.save_before_deadline={value}")
