"""The pages a user reads say what the code does."""

import re
from pathlib import Path

from engine import starter
from engine.config import file as config_file
from engine.config.file import known_keys
from engine.monitoring.guardrails import DEFAULT_RULES
from scripts import metrics_page
from scripts.configuration_page import page

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS.parent / "examples"


def test_the_configuration_page_is_what_the_code_would_write():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert text == page(), "run: python -m scripts.configuration_page"


def test_the_metrics_page_is_what_the_code_would_write():
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert text == metrics_page.page(), "run: python -m scripts.metrics_page"


def test_every_key_stands_on_the_page_and_is_explained():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    for key in known_keys():
        row = next(r for r in rows if r.startswith((f"| `{key}` ", f"| `{key}` ⇄")))
        assert len(row.rstrip(" |").rsplit("|", 1)[1].strip()) > 3, row


def test_every_example_is_a_configuration():
    for path in [*EXAMPLES.glob("*.yaml"), starter.FOLDER / "demo.yaml"]:
        config_file.load(path)


def test_the_default_guard_rails_stand_on_the_page_of_the_app_with_their_thresholds():
    text = (DOCS / "tui.md").read_text(encoding="utf-8")
    for rule in DEFAULT_RULES:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{rule.name}` |"))
        assert row.endswith(f"| {rule.action} |")
        assert f"`{rule.metric}`" in row or rule.metric == "*"
        threshold = next((v for v in (rule.above, rule.below) if v is not None), None)
        change = rule.falls or rule.rises
        assert threshold is None or f"{threshold:g}" in row
        assert change is None or f"{change:.0%}".replace("%", " %") in row
        assert rule.of is None or rule.of in row


def test_the_pages_on_the_objective_name_keys_that_exist():
    keys, named = known_keys(), set()
    for path in [DOCS / "ppo.md", *DOCS.glob("from-*.md")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.name != "ppo.md":  # the second column of a table has our keys
            lines = [line.split(" | ")[1] for line in lines if line.count(" | ") > 1]
        named |= set(re.findall(r"`([a-z]+(?:\.[a-z_]+)+)[:`]", "\n".join(lines)))
    ours = {name for name in named if name.split(".")[0] in {k.split(".")[0] for k in keys}}
    assert len(ours) > 50
    assert not {name for name in ours if not any(f"{k}.".startswith(f"{name}.") for k in keys)}
