"""Types that several threads decode for the first time at once."""

import ast
import subprocess
import sys
from pathlib import Path

import engine
import rlhf_tui

SOURCES = sorted(
    path
    for package in (engine, rlhf_tui)
    for path in Path(package.__file__).parent.rglob("*.py")
    if path.name != "examined.py"
)

FIRST_USE = """
import sys, threading
sys.setswitchinterval(1e-6)
from engine.config.file import from_tree
from engine.config.paths import path_keys

TREE = {"model": {"policy": "a"}, "data": {"prompts": "b"}, "reward": {"model": "c"}}
start = threading.Barrier(8)
configs = []

def load():
    start.wait()
    path_keys()
    configs.append(from_tree(TREE))

threads = [threading.Thread(target=load) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(configs))
"""


def test_threads_may_use_a_type_for_the_first_time_together():
    for _ in range(3):  # without `examined` 16 of 20 of these processes ended by SIGSEGV
        done = subprocess.run(
            [sys.executable, "-c", FIRST_USE], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr


def types_decoded(tree):
    """The expressions that msgspec's decoders, `convert` and `inspect` take as a type."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        text = ast.unparse(call.func)
        if text in ("Decoder", "msgspec.json.Decoder", "msgspec.msgpack.Decoder"):
            yield from call.args
        elif text == "msgspec.convert":
            yield call.args[1]
        elif text == "msgspec.inspect.type_info":  # it makes a decoder
            yield call.args[0]
        elif text in ("msgspec.json.decode", "msgspec.msgpack.decode"):
            yield from (k.value for k in call.keywords if k.arg == "type")


def test_every_type_that_is_decoded_is_examined_before():
    found = [
        (path, kind)
        for path in SOURCES
        if "msgspec" in (text := path.read_text())
        for kind in types_decoded(ast.parse(text))
    ]
    assert len(found) > 50
    others = [(p, k) for p, k in found if not ast.unparse(k).startswith("examined(")]
    assert not others, [f"{path}:{kind.lineno}" for path, kind in others]
