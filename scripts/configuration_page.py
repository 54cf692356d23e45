"""Writes docs/configuration.md from engine/config/schema.py.

    python -m scripts.configuration_page

The page has a table for each section, with the type, default and docstring of each key. A test
compares the page with the code.
"""

import ast
import re
from pathlib import Path

from engine.config import schema
from engine.config.settings import LIVE_SETTINGS

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """# The configuration, key by key

One YAML file describes a run: `rlhf-tui run FILE`. Three sections have no defaults: `model`, `data`
and `reward`. Any key can be set on the command line with `-o section.key=value`; values are written
as in YAML. Relative paths are relative to the file's folder. The complete configuration, defaults
included, is written to the session's `config.yaml`.

A resume (`rlhf-tui resume NAME -o …`) may change all keys except those that determine the model or
the order of the data: `seed`, `data.*`, `model.*`, `lora.*`, `rollout.batch_size`,
`rollout.per_prompt` and `ppo.advantage`. A fork may change these too, except `lora.*`. Keys with ⇄
can also be changed during the run (`rlhf-tui ctl NAME set key=value`).
"""
COLUMNS = "| key | takes | default | |\n|---|---|---|---|"
NESTED = {"A source of `reward.mix`": "RewardSource", "A rule of `guardrails.rules`": "Rule"}
TYPE_NAMES = [
    (r"Annotated\[float, Meta\(gt=0, lt=1\)\]", "number in (0, 1)"),
    (r"Annotated\[int, Meta\(ge=2\)\]", "whole number ≥ 2"),
    (r"Annotated\[int, Meta\(ge=0, le=19\)\]", "0 to 19"),
    (r"Literal\[(.*?)\]", lambda m: re.sub(r"'(\w+)'", r"`\1`", m[1]).replace(", ", " | ")),
    (r"list\[RewardSource\]", "list of sources"),
    (r"list\[Rule\]", "list of rules"),
    (r"list\[str\]", "list of texts"),
    (r"list\[Whole\]", "list of whole numbers"),
    (r"tuple\[Fraction, Fraction\]", "two numbers in [0, 1]"),
    (r"\bPositive\b", "number > 0"),
    (r"\bNonNegative\b", "number ≥ 0"),
    (r"\bFraction\b", "number in [0, 1]"),
    (r"\bCount\b", "whole number ≥ 1"),
    (r"\bWhole\b", "whole number ≥ 0"),
    (r"\bfloat\b", "number"),
    (r"\bint\b", "whole number"),
    (r"\bstr\b", "text"),
    (r"\bbool\b", "true, false"),
    (r" \| None", ""),
    (r" \| ", r" \\| "),
]


def page() -> str:
    """The text of the page."""
    source = Path(schema.__file__).read_text(encoding="utf-8")
    nodes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    classes = {n.name: n for n in nodes}
    seed = "| `seed` | whole number ≥ 0 | `0` | With the step, determines all random numbers. |"
    parts = [HEAD, f"{COLUMNS}\n{seed}"]
    for node in classes["RunConfig"].body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) in classes:
            section = classes[ast.unparse(node.annotation)]
            name = ast.unparse(node.target)
            parts.append(_table(f"`{name}`", section, f"{name}."))
    parts += [_table(title, classes[name], "") for title, name in NESTED.items()]
    return "\n\n".join(parts) + "\n"


def _table(title: str, section: ast.ClassDef, prefix: str) -> str:
    rows = [
        f"## {title}\n\n{ast.get_docstring(section)}\n\n{COLUMNS}",
    ]
    for node, after in zip(section.body, [*section.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            key = prefix + ast.unparse(node.target)
            mark = " ⇄" if key in LIVE_SETTINGS.values() else ""
            values = ast.unparse(node.annotation)
            for pattern, name in TYPE_NAMES:
                values = re.sub(pattern, name, values)
            default = _default(node.value)
            rows.append(f"| `{key}`{mark} | {values} | {default} | {_docstring(after)} |")
    return "\n".join(rows)


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    text = ast.unparse(value).strip("'").replace("True", "true").replace("False", "false")
    return "–" if text in ("None", "[]") else f"`{text}`"


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
