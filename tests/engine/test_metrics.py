"""Metrics are declared once, and named nowhere else but where they are computed."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import engine
import rlhf_tui
from engine.metrics import CONTRACT, METRICS, REWARD_SOURCE, describe, title_of
from engine.monitoring.guardrails import DEFAULT_RULES

ENGINE = Path(engine.__file__).parent
TUI = Path(rlhf_tui.__file__).parent
NAMES = {metric.name for metric in METRICS if "/" in metric.name}
USERS = [
    path
    for path in [*sorted(ENGINE.rglob("*.py")), *sorted(TUI.rglob("*.py"))]
    if path != ENGINE / "metrics.py" and not path.is_relative_to(ENGINE / "train")
]


def test_no_metric_is_declared_twice():
    assert not [name for name, n in Counter(m.name for m in METRICS).items() if n > 1]
    titles = Counter(title_of(m.name) for m in METRICS)
    assert not [title for title, n in titles.items() if n > 1]


@pytest.mark.parametrize("path", USERS, ids=lambda p: str(p.relative_to(p.parents[2])))
def test_who_uses_a_metric_takes_its_name_from_the_declaration(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} - {None}
    assert not NAMES & {t for t in texts if isinstance(t, str)}


def test_the_default_guard_rails_watch_declared_metrics():
    assert {rule.metric for rule in DEFAULT_RULES} - {"*"} <= {m.name for m in METRICS}


def test_a_reward_source_of_any_name_is_declared_by_the_pattern():
    assert describe("reward/politeness").name == REWARD_SOURCE
    assert title_of("reward/politeness") == "reward/politeness"


def test_metrics_that_scripts_rely_on_are_declared():
    assert len(set(CONTRACT)) == len(CONTRACT)
    assert set(CONTRACT) <= {metric.name for metric in METRICS}


def test_an_undeclared_metric_of_a_newer_session_is_shown_by_its_name():
    assert title_of("future/number") == "future/number"
    assert describe("future/number").unit == ""
