"""The examples of docs/contributing.md have the methods that the code calls."""

import ast

import pytest

from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/contributing.md"


def methods(source, name):
    """Method → names of its parameters, of the class `name`."""
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    functions = (f for f in found.body if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef))
    return {f.name: [a.arg for a in (*f.args.args, *f.args.kwonlyargs)] for f in functions}


@pytest.mark.parametrize(
    ("example", "module", "protocol"),
    [
        ("EngineBackend", "engine/train/rollout/backend.py", "RolloutBackend"),
        ("CommandReward", "engine/train/rewards/source.py", "Reward"),
        ("FileChannel", "engine/monitoring/notify.py", "Channel"),
    ],
)
def test_a_class_of_the_page_has_the_methods_of_its_protocol(example, module, protocol):
    wanted = methods((ROOT / module).read_text(encoding="utf-8"), protocol)
    (block,) = (block for block in blocks(PAGE, "python") if f"class {example}:" in block)
    shown = methods(block, example)
    called = {name for name, parameters in wanted.items() if parameters != ["self"]}
    assert {name: shown[name] for name in called} == {name: wanted[name] for name in called}
