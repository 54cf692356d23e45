"""Writes docs/configuration.md from engine/config/schema.py and the sections beside it.

Run ``python -m scripts.configuration_page``. Each section becomes a table of its keys with their
types, defaults and docstrings. A comment `# -- title ---` in the class of a section begins a group:
the keys below it get a table with that title. A test compares the page with the code.
"""

import ast
import bisect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from engine import metrics
from engine.config import schema, sections
from engine.config.sections.ppo import ADVANTAGES, AdvantageTraits
from engine.config.settings import LIVE_SETTINGS

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """# The configuration, key by key

A run is described by one YAML file: `rlhf-tui run FILE`, where `starter:demo` is that of
`rlhf-tui demo`. The sections `model`, `data` and `reward` are required; the other sections can be
omitted. Any key can be given on the command line as `-o section.key=value`, with the value written
as in YAML. Relative paths start at the file's folder. The session's `config.yaml` states the value
of every key, including the defaults.

A resume (`rlhf-tui resume NAME -o …`) can change any key except those that determine the model,
the order of the data or the optimiser's state:
FIXED. A fork can change these too, except
`lora.*` and the value function that is trained (`model.value`, `ppo.advantage`): a checkpoint
depends on them. It keeps all of its parent's values, including defaults; the command lists keys
whose default has changed since.

Keys marked ⇄ can also be changed during the run (`rlhf-tui ctl NAME set key=value`).

The column *takes* shows the values of a key:

| in the table | in YAML |
|---|---|
| text | a string, in quotes if YAML would read something else, as with `"22:00-07:00"` |
| path | a file or folder; a relative one starts at the folder of the configuration |
| number, whole number | `0.5`, `1.0e-6`; `16` |
| number in [0, 1), in (0, 1] | a square bracket includes the limit, a round one does not |
| `fixed` \\| `adaptive` | one of these words |
| list of … | `[a, b]`, or one `- a` per line |
| mapping | keys of your choice: `{max_tokens: 512}` |

A dash as the default means that nothing is set (`null`, an empty list or an empty text). The
description says after *Default:* what then applies.

Every number has a lower and an upper bound. The tables give the bounds that are not obvious. Where
they say `> 0`, `≥ 0` or `≥ 1`, the other limits (10⁻¹² and 10¹²) are far outside the useful
range."""
BY_ESTIMATOR = {"rollout.per_prompt": "per_prompt", "ppo.whiten": "whiten"}
"""Key → the trait of estimators that is its default."""
GROUP = re.compile(r"    # -- (.+?) -+")
"""The comment that begins a group of keys, a line by itself."""
COLUMNS = "| key | takes | default | |\n|---|---|---|---|"
LIST_ITEMS = {
    "A data set of `data.prompts`": "PromptSource",
    "A source of `reward.mix`": "RewardSource",
    "The value of `train.stop_at`": "StopAt",
    "A rule of `guardrails.rules`": "Rule",
    "A webhook of `notify.webhooks`": "Webhook",
    "The settings of `reward train`": "RewardTrainingConfig",
}
TYPE_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"Annotated\[(\w+), Meta\((ge|gt)=(.+?), (le|lt)=(.+?)\)\]", lambda m: _interval(*m.groups())),
    (r"Annotated\[int, Meta\(ge=0\)\]", "whole number ≥ 0"),
    (r"tuple\[Decay, Decay\]", "two numbers in [0, 1)"),
    (r"\bCoefficient\b", "number in [0, 1e6]"),
    (r"tuple\[Bounded, Bounded\]", "two numbers"),
    (r"\bBounded\b", "number in [-1e6, 1e6]"),
    (r"dict\[str, Any\]", "mapping"),
    (r"\bSeconds\b", "number > 0"),
    (r"Literal\[(.*?)\]", lambda m: re.sub(r"'(\w+)'", r"`\1`", m[1]).replace(", ", " | ")),
    (r"list\[RewardSource\]", "list of [sources](#a-source-of-rewardmix)"),
    (r"list\[PromptSource\]", "list of [data sets](#a-data-set-of-dataprompts)"),
    (r"list\[Rule\]", "list of [rules](#a-rule-of-guardrailsrules)"),
    (r"list\[Webhook\]", "list of [webhooks](#a-webhook-of-notifywebhooks)"),
    (r"list\[str\]", "list of texts"),
    (r"list\[Whole\]", "list of whole numbers"),
    (r"\bStopAt\b", "[a metric and a limit](#the-value-of-trainstop_at)"),
    (r"\bPositive\b", "number > 0"),
    (r"\bNonNegative\b", "number ≥ 0"),
    (r"\bFraction\b", "number in [0, 1]"),
    (r"\bCount\b", "whole number ≥ 1"),
    (r"\bShare\b", "number in [0.05, 0.5]"),
    (r"\bWhole\b", "whole number ≥ 0"),
    (r"\bfloat\b", "number"),
    (r"\bint\b", "whole number"),
    (r"\b(str|PathOrName|Program)\b", "text"),
    (r"\bLinkPath\b", "path"),
    (r"\bbool\b", "`true` | `false`"),
    (r" \| None", ""),
    (r" \| ", r" \\| "),
]


def _interval(kind: str, start: str, low: str, end: str, high: str) -> str:
    opening, close = "[" if start == "ge" else "(", "]" if end == "le" else ")"
    return f"{kind} in {opening}{_bound(low)}, {_bound(high)}{close}"


def _bound(text: str) -> str:
    """A bound as people write it: 10000, 1e6."""
    mantissa, _, exponent = f"{float(text):.0e}".partition("e")
    large_or_small = text != "0" and not -3 < int(exponent) < 5
    return f"{mantissa}e{int(exponent)}" if large_or_small else text


def page() -> str:
    """The text of the page."""
    files = [Path(schema.__file__), *Path(sections.__path__[0]).glob("*.py")]
    classes = {c.node.name: c for file in files for c in _classes(file)}
    seed = "| `seed` | whole number ≥ 0 | `0` | Seed of every random choice. |"
    parts = [HEAD.replace("FIXED", _fixed()), f"{COLUMNS}\n{seed}"]
    for node in classes["RunConfig"].node.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) in classes:
            section = classes[ast.unparse(node.annotation)]
            name = ast.unparse(node.target)
            parts.append(_table(f"`{name}`", section, f"{name}.", classes))
    parts += [_table(title, classes[name], "", classes) for title, name in LIST_ITEMS.items()]
    return wrapped("\n\n".join(parts)) + "\n"


def wrapped(text: str) -> str:
    """A page with the width of the others. Headings and tables stay as they are."""
    return "\n\n".join(map(_wrapped, text.split("\n\n")))


def _wrapped(paragraph: str) -> str:
    if paragraph.startswith(("#", "|")):
        return paragraph
    kept = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), paragraph)
    filled = textwrap.fill(kept, 120, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\0", " ")


class _Class(NamedTuple):
    node: ast.ClassDef
    groups: dict[int, str]
    """Line of the comment that begins a group → its title."""

    def parts(self) -> list[tuple[str, list[ast.stmt]]]:
        """The title and the statements of each group; those before the first have no title."""
        starts = [0, *self.groups]
        parts: list[list[ast.stmt]] = [[] for _ in starts]
        for statement in self.node.body:
            parts[bisect.bisect(starts, statement.lineno) - 1].append(statement)
        return list(zip(["", *self.groups.values()], parts, strict=True))


def _classes(file: Path) -> list[_Class]:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return [
        _Class(
            node,
            {
                number: found[1]
                for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
                if (found := GROUP.fullmatch(lines[number - 1]))
            },
        )
        for node in nodes
    ]


def _fixed() -> str:
    """The keys that a resume keeps: `seed`, `data.*` except `data.cache`, …, in a sentence."""
    names = []
    for name in schema.FIXED_AT_START:
        free = [f"`{key}`" for key in schema.FREE_ON_RESUME if key.startswith(name)]
        shown = f"`{name}*`" if name.endswith(".") else f"`{name}`"
        names.append(f"{shown} except {' and '.join(free)}" if free else shown)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _table(title: str, section: _Class, prefix: str, classes: dict[str, _Class]) -> str:
    """The heading of a section and its table, or the tables of its groups."""
    text = f"## {title}\n\n{ast.get_docstring(section.node)}"
    before = _inherited_rows(section, prefix, classes)
    for group, statements in section.parts():
        rows, before = before + _rows(statements, prefix, classes), []
        if rows:
            heading = f"\n\n### {group[0].upper()}{group[1:]}" if group else ""
            text += "\n".join([f"{heading}\n\n{COLUMNS}", *rows])
    return text


def _inherited_rows(section: _Class, prefix: str, classes: dict[str, _Class]) -> list[str]:
    """The rows of the keys of its base class."""
    bases = [classes[ast.unparse(b)] for b in section.node.bases if ast.unparse(b) in classes]
    return [row for base in bases for row in _all_rows(base, prefix, classes)]


def _all_rows(section: _Class, prefix: str, classes: dict[str, _Class]) -> list[str]:
    own = _rows(section.node.body, prefix, classes)
    return _inherited_rows(section, prefix, classes) + own


def _rows(statements: list[ast.stmt], prefix: str, classes: dict[str, _Class]) -> list[str]:
    """The rows of keys; those of a nested section take its place."""
    rows = []
    for node, after in zip(statements, [*statements[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            key = prefix + ast.unparse(node.target)
            if (inner := classes.get(ast.unparse(node.annotation))) is not None:
                rows += _all_rows(inner, f"{key}.", classes)
                continue
            mark = " ⇄" if key in LIVE_SETTINGS.values() else ""
            values = ast.unparse(node.annotation)
            for pattern, name in TYPE_NAMES:
                values = re.sub(pattern, name, values)
            default = _default(node.value)
            text = _docstring(after)
            if key in BY_ESTIMATOR:
                text = f"{text.removesuffix('.')}: {_by_estimator(BY_ESTIMATOR[key])}."
            rows.append(f"| `{key}`{mark} | {values} | {default} | {text} |")
    return rows


def _by_estimator(trait: str) -> str:
    """A default that the traits of estimators determine: `8 for grpo and opo, 1 otherwise`."""
    names: dict[int, list[str]] = {}
    for name, traits in ADVANTAGES.items():
        names.setdefault(getattr(traits, trait), []).append(name)
    usual: int = getattr(AdvantageTraits(), trait)

    def word(value: int) -> str:
        return ("off", "on")[value] if isinstance(value, bool) else str(value)

    parts = [f"{word(usual)} otherwise"]
    for value in sorted(names.keys() - {usual}):
        *rest, last = names[value]
        parts.append(f"{word(value)} for {' and '.join(filter(None, (', '.join(rest), last)))}")
    return ", ".join(reversed(parts))


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    if isinstance(value, ast.Name) and value.id.isupper():
        return f"`{getattr(metrics, value.id)}`"
    given = ast.literal_eval(value)
    if given in (None, [], ""):
        return "–"
    return f"`{given if isinstance(given, str) else _as_yaml(given)}`"


def _as_yaml(given: object) -> str:
    """A default on one line: `true`, `[0.9, 0.999]`; numbers as Python writes them."""
    if isinstance(given, tuple):
        return f"[{', '.join(map(str, given))}]"
    return str(given).lower()


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        text = " ".join(str(node.value.value).split())
        linked = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text)
        return linked.replace("|", r"\|")  # in a cell of a table
    return ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
