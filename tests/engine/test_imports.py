"""Who imports whom: start-up stays light, and torch stays behind its wall."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import engine
import rlhf_tui
from rlhf_tui.cli import COMMANDS

ENGINE = Path(engine.__file__).parent
TUI = Path(rlhf_tui.__file__).parent
HEAVY = {
    "torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "pyarrow", "scipy",
    "safetensors", "tensorboard", "peft", "tokenizers",
}  # fmt: skip
OF_A_RANK = {
    "engine.config", "engine.protocol", "engine.session", "engine.memory", "engine.launch",
    "engine.errors", "engine.metrics", "engine.starter", "engine.kl",
}  # fmt: skip
"""Packages and modules of the engine that ranks use besides their own."""
LIGHT = [
    "rlhf_tui.cli", "rlhf_tui.headless", "rlhf_tui.app.app", "engine.supervisor.supervisor",
    "engine.__main__",
    *(f"rlhf_tui.commands.{name}" for name in sorted(set(COMMANDS.values()))),
]  # fmt: skip


def files(folder):
    return sorted(folder.rglob("*.py"))


def module_of(path):
    package = ENGINE.parent if path.is_relative_to(ENGINE) else TUI.parent
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Every module a file imports, anywhere in it; `from engine import x` names engine.x."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for block in [n for n in ast.walk(tree) if isinstance(n, ast.If)]:
        if ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = []  # never imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if is_module(whole) else str(node.module))
    return found


def is_module(name):
    package = ENGINE.parent if name.startswith("engine") else TUI.parent
    path = package.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("module", [m for m in LIGHT if find_spec(m)])
def test_what_must_start_at_once_loads_nothing_heavy(module):
    script = f"import sys, {module}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("path", files(ENGINE), ids=module_of)
def test_the_engine_knows_nothing_of_its_dashboard(path):
    assert not {m for m in imported(path) if m.split(".")[0] in ("rlhf_tui", "textual", "click")}


@pytest.mark.parametrize("path", files(ENGINE / "train"), ids=module_of)
def test_a_rank_imports_little_of_the_engine(path):
    ours = {m for m in imported(path) if m.split(".")[0] == "engine"}
    others = {".".join(m.split(".")[:2]) for m in ours} - {"engine", "engine.train"}
    assert not others - OF_A_RANK


@pytest.mark.parametrize(
    "path",
    [p for p in files(ENGINE) + files(TUI) if not p.is_relative_to(ENGINE / "train")],
    ids=module_of,
)
def test_only_a_rank_imports_torch_and_its_kind(path):
    names = imported(path)
    assert not {m for m in names if m.split(".")[0] in HEAVY}
    assert not {m for m in names if m.startswith("engine.train")}


def test_nothing_in_the_engine_imports_in_a_circle():
    graph = {module_of(p): imported(p) for p in files(ENGINE)}
    graph = {m: {n for n in names if n in graph} for m, names in graph.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)
