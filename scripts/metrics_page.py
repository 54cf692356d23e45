"""Writes docs/metrics.md from engine/metrics.py: ``python -m scripts.metrics_page``.

A test compares the page with the code.
"""

from pathlib import Path

from engine.metrics import BY_READERS, METRICS
from scripts.configuration_page import wrapped

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
HEAD = """# Metrics and their units

Each step yields one value of each metric. The values are in the journal (`rlhf-tui metrics NAME`),
on the dashboard and in the TensorBoard files. Metrics that TRL also has are named as in TRL. Every
mean is masked: padding does not count. A metric without a value at a step is omitted (`null` in
JSON).
"""
COLUMNS = "| name | unit | description |\n|---|---|---|"


def page() -> str:
    """The text of the page."""
    rows = [f"| `{m.name}` | {m.unit or '–'} | {m.description} |" for m in (*METRICS, *BY_READERS)]
    return wrapped("\n".join([HEAD, COLUMNS, *rows])) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
