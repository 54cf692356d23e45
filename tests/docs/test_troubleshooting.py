"""The page of symptoms quotes messages that the code prints."""

import ast
import re

import pytest

from engine.monitoring.guardrails import DEFAULT_RULES
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TABLE = re.compile(r"^\| message \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)


def quoted_messages():
    """The first column of the tables of messages: what is in backticks in it."""
    rows = [row for table in TABLE.findall(PAGE) for row in table.splitlines()]
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


@pytest.fixture(scope="module")
def literals():
    """All text that stands in the source, one literal or part of an f-string a line."""
    files = [*(ROOT / "engine").rglob("*.py"), *(ROOT / "rlhf_tui").rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_the_page_quotes_many_messages():
    assert len(quoted_messages()) > 60


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_stands_in_the_source(message, literals):
    for part in message.split("…"):  # what stands for a value
        assert part.strip() in literals


def test_every_default_guard_rail_stands_beside_a_symptom():
    assert not {rule.name for rule in DEFAULT_RULES if f"`{rule.name}`" not in PAGE}
