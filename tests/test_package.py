"""What the wheel declares and what the code needs."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"engine", "rlhf_tui"}
OTHER_ENVIRONMENTS = {"vllm"}
"""Imported by programs that run in an environment of their own (docs/vllm.md)."""

COMES_WITH = {"mcp_types": "mcp", "pydantic": "mcp"}
"""Module → the package whose interface it is part of."""


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def imported():
    """Module → the files that import it, of other packages than ours and the standard library's."""
    found = {}
    for path in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "rlhf_tui").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(path.name)
    known = sys.stdlib_module_names | OURS | OTHER_ENVIRONMENTS
    return {name: files for name, files in found.items() if name not in known}


def test_every_package_that_is_imported_is_declared():
    declared = {name_of(r) for r in PROJECT["dependencies"]}
    declared |= {name_of(r) for extra in PROJECT["optional-dependencies"].values() for r in extra}
    distributions = packages_distributions()
    missing = {
        module: sorted(files)
        for module, files in imported().items()
        if COMES_WITH.get(module) not in declared
        and not declared
        & {d.lower().replace("_", "-") for d in distributions.get(module, [module])}
    }
    assert not missing


def test_the_package_says_its_version_once():
    text = (ROOT / "engine" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{PROJECT["version"]}"' in text


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=str)
def test_every_link_of_a_page_leads_somewhere(page):
    """To a file of the repository and, with #, to a heading of it."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        if not path.exists() or (heading and heading not in headings(path)):
            broken.append(target)
    assert not broken


def headings(path):
    """The names by which the headings of a page are linked to."""
    lines = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}
