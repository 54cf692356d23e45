"""Who imports whom: no circles, nothing upward, a light start-up, and torch behind its wall."""

import ast
import functools
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import engine
import rlhf_tui
from rlhf_tui.cli import MODULES

ENGINE = Path(engine.__file__).parent
TUI = Path(rlhf_tui.__file__).parent
HEAVY = {
    "torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "pyarrow", "scipy",
    "safetensors", "tensorboard", "peft", "tokenizers",
}  # fmt: skip
OF_A_RANK = {
    "engine.config", "engine.protocol", "engine.session", "engine.memory", "engine.launch",
    "engine.agreement", "engine.errors", "engine.examined", "engine.metrics", "engine.starter",
    "engine.kl", "engine.log_lines", "engine.nvml", "engine.progress", "engine.tls",
}  # fmt: skip
"""Packages and modules of the engine that ranks use besides their own."""
FLOORS = [
    (
        "engine",
        "engine.agreement",
        "engine.errors",
        "engine.examined",
        "engine.kl",
        "engine.log_lines",
        "engine.metrics",
        "engine.progress",
        "engine.starter",
        "engine.tls",
    ),
    ("engine.config.sections",),
    ("engine.config",),
    ("engine.memory", "engine.session"),
    ("engine.protocol",),
    ("engine.journal",),
    ("engine.monitoring",),
    ("engine.launch", "engine.verification"),
    ("engine.supervisor",),
    ("engine.__main__", "engine.api"),
    # What runs in a rank, beside the supervisor. Masked means are used by rollouts and losses.
    ("engine.train", "engine.train.data", "engine.train.ppo.masked"),
    ("engine.train.distributed",),
    ("engine.train.models",),
    ("engine.train.rollout",),
    ("engine.train.link", "engine.train.ppo", "engine.train.rewards"),
    (
        "engine.train.checkpoints",
        "engine.train.environment",
        "engine.train.evaluation.held_out",
    ),
    ("engine.train.policy_average", "engine.train.reward_training"),
    ("engine.train.run",),
    ("engine.train.experience",),
    (
        "engine.train.checkpoints.manager",
        "engine.train.evaluation",
        "engine.train.live_settings",
        "engine.train.load_checks",
        "engine.train.reports",
        "engine.train.reward_scales",
    ),
    ("engine.train.end_criteria",),
    ("engine.train.boundary", "engine.train.step"),
    ("engine.train.evaluation.scheduled", "engine.train.out_of_memory"),
    ("engine.train.failure",),
    ("engine.train.load",),
    (
        "engine.train.check",
        "engine.train.evaluation.__main__",
        "engine.train.reward_training.__main__",
        "engine.train.worker",
    ),
    ("engine.train.torchrun",),
    # The dashboard and the command line.
    ("rlhf_tui", "rlhf_tui.format", "rlhf_tui.identity", "rlhf_tui.text"),
    ("rlhf_tui.state",),
    ("rlhf_tui.remote", "rlhf_tui.report", "rlhf_tui.widgets"),
    ("rlhf_tui.dialogs",),
    ("rlhf_tui.screens",),
    ("rlhf_tui.app",),
    ("rlhf_tui.commands", "rlhf_tui.headless"),
    ("rlhf_tui.cli",),
    ("rlhf_tui.__main__",),
]
"""From the bottom up. A package imports from floors below its own, not from its own or above."""
MOST_MODULES = 15
"""In one folder. About ten is what a reader takes in at a glance."""
LIGHT = [
    "rlhf_tui.cli", "rlhf_tui.headless", "rlhf_tui.app.app", "engine.supervisor.serve",
    "engine.__main__", "engine.api",
    *(f"rlhf_tui.commands.{name}" for name in sorted(set(MODULES.values()))),
    *(["rlhf_tui.commands.integration.mcp_server"] if find_spec("mcp") else []),
]  # fmt: skip


def files(folder):
    return sorted(folder.rglob("*.py"))


def module_of(path):
    package = ENGINE.parent if path.is_relative_to(ENGINE) else TUI.parent
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imported(path):
    """Every module a file imports, anywhere in it; `from engine import x` names engine.x.

    What stands under `TYPE_CHECKING` is imported by no process, but the file depends on it.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


def test_what_must_start_at_once_loads_nothing_heavy():
    modules = [module for module in LIGHT if find_spec(module)]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    print(name, *{module.partition('.')[0] for module in sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *modules],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    loaded = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    assert list(loaded) == modules
    assert not {module: names & HEAVY for module, names in loaded.items() if names & HEAVY}


def offending(paths, offends):
    """By module, the imports that offend."""
    found = {module_of(p): sorted(filter(offends, imported(p))) for p in paths}
    return {module: names for module, names in found.items() if names}


def test_the_engine_knows_nothing_of_its_dashboard():
    others = ("rlhf_tui", "textual", "click")
    assert not offending(files(ENGINE), lambda m: m.split(".")[0] in others)


def test_a_rank_imports_little_of_the_engine():
    allowed = OF_A_RANK | {"engine", "engine.train"}

    def offends(module):
        package, *rest = module.split(".")
        return package == "engine" and ".".join([package, *rest[:1]]) not in allowed

    assert not offending(files(ENGINE / "train"), offends)


def test_only_a_rank_imports_torch_and_its_kind():
    others = [p for p in files(ENGINE) + files(TUI) if not p.is_relative_to(ENGINE / "train")]

    def offends(module):
        return module.split(".")[0] in HEAVY or module.startswith("engine.train")

    assert not offending(others, offends)


def test_no_process_of_ours_imports_from_the_working_folder():
    lines = {
        f"{module_of(path)}: {line.strip()}"
        for path in files(ENGINE) + files(TUI)
        for line in path.read_text(encoding="utf-8").splitlines()
        if '"-m"' in line and '"-P", "-m"' not in line
    }
    assert not lines


def unit_of(module):
    """The entry of `FLOORS` that a module belongs to: the longest that its name begins with."""
    known = [u for floor in FLOORS for u in floor if f"{module}.".startswith(f"{u}.")]
    assert known, f"{module} stands on no floor: add its package to FLOORS"
    return max(known, key=len)


@functools.cache
def import_graph():
    """Our modules, and which of ours each imports."""
    graph = {module_of(p): imported(p) for p in files(ENGINE) + files(TUI)}
    return {m: {n for n in names if n in graph} for m, names in graph.items()}


UNITS = sorted(u for floor in FLOORS for u in floor)


def test_a_package_imports_only_from_floors_below():
    floor = {u: number for number, units in enumerate(FLOORS) for u in units}
    upward = {
        f"{module} → {other}"
        for module, others in import_graph().items()
        for other in others
        if unit_of(other) != unit_of(module) and floor[unit_of(other)] >= floor[unit_of(module)]
    }
    assert not upward


def test_every_floor_is_of_a_package_that_exists():
    assert not [unit for unit in UNITS if not is_module(unit)]


def circles():
    """Each group of modules that import each other, directly or through others."""
    graph = import_graph()

    def reached(start):
        found, left = set(), [start]
        while left:
            for other in graph[left.pop()] - found:
                found.add(other)
                left.append(other)
        return found

    reach = {module: reached(module) for module in graph}
    return {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in graph
        if module in reach[module]
    }


def test_no_modules_import_each_other_in_a_circle():
    assert not {" ⇄ ".join(sorted(c)) for c in circles()}


def test_a_folder_has_few_modules():
    folders: dict[Path, set[str]] = {}
    for path in files(ENGINE) + files(TUI):
        folders.setdefault(path.parent, set()).add(path.stem)
    crowded = {
        f.name: sorted(n) for f, n in folders.items() if len(n - {"__init__"}) > MOST_MODULES
    }
    assert not crowded
