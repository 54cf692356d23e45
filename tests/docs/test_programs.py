"""The example whose reward runs programs of the policy in a sandbox."""

import json
import shutil
import sys

import pytest

from examples import programs


def usable():
    try:
        programs.check_sandbox()
    except RuntimeError:
        return False
    return True


needs_sandbox = pytest.mark.skipif(not usable(), reason="bubblewrap cannot make a sandbox here")


@pytest.fixture(params=["sandbox", "plain"])
def runs(request, monkeypatch):
    """Runs programs; also without a sandbox, where none can be made: those here are harmless."""
    if request.param == "plain":
        command = [sys.executable, "-I", "-c", programs.RUNNER]
        monkeypatch.setattr(programs, "sandboxed", lambda: command)
        monkeypatch.setattr(programs, "check_sandbox", lambda: None)
    elif not usable():
        pytest.skip("bubblewrap cannot make a sandbox here")
    return programs.run


def test_the_reward_is_the_share_of_calls_with_the_right_result(runs):
    completions = [
        "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.",
        [{"role": "assistant", "content": "def double(x):\n    return x + 3"}],
        "def twice(x): return 2 * x",
        "I cannot do that.",
    ]
    rows = len(completions)
    assert programs.rewarded(
        completions, name=["double"] * rows, inputs=[[[1], [3]]] * rows, outputs=[[2, 6]] * rows
    ) == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "def f(x):\n    while True: pass",
        "def f(x): raise SystemExit",
        "def f(x): return {x}",
        "def f(x): return [0] * 10**10",
        "import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'[' * 90_000 + b'\\n\\xff\\n')\n"
        "    except OSError: pass",
        "import os\nwhile True: os.write(3, b'x' * 10_000)",
        "\ud800",
    ],
)
def test_a_program_that_ends_loops_or_writes_nonsense_has_no_result_that_is_right(
    runs, monkeypatch, program
):
    monkeypatch.setattr(programs, "SECONDS", 2)
    results = runs(program, "f", [[1], [2]])
    assert programs.share(results, [1, 2]) == 0


def test_the_policy_is_told_the_first_wrong_result_until_the_program_is_right(runs):
    environment = programs.Programmer("double", inputs=[[1], [3]], outputs=[2, 6])
    assert environment.reply("def double(x): return x + 1") == (
        "double(3): returned 4, not 6. Write the function again."
    )
    assert environment.right() == 0.5
    assert environment.reply("def double(x): return y").startswith("double(1): NameError: ")
    assert "there is no function double" in str(environment.reply("x = 1"))
    assert environment.right() == 0
    assert environment.reply("def double(x): return 2 * x") is None
    assert environment.right() == 1


def test_the_tasks_are_the_same_for_a_seed_and_have_what_their_functions_return(tmp_path):
    data, again = tmp_path / "programs.jsonl", tmp_path / "again.jsonl"
    for path in (data, again):
        programs.write(path, count=60, seed=1)
    assert data.read_bytes() == again.read_bytes()
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    assert {row["name"] for row in rows} == programs.TASKS.keys()
    assert all(len(row["inputs"]) == len(row["outputs"]) for row in rows)
    row = next(row for row in rows if row["name"] == "rotated")
    (values,) = row["inputs"][-1]
    assert sorted(row["outputs"][-1]) == sorted(values)


def test_without_bubblewrap_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="install bubblewrap"):
        programs.check_sandbox.__wrapped__()


@needs_sandbox
def test_a_program_cannot_reach_files_of_the_user_nor_write_any_nor_use_the_network(tmp_path):
    (tmp_path / "secret").write_text("secret")
    program = f"""
import os, socket
def tried(action):
    try: return str(action())
    except OSError as error: return error.strerror
def f():
    return [
        tried(lambda: open({str(tmp_path / "secret")!r}).read()),
        tried(lambda: open("/new", "w")),
        tried(lambda: open("/usr/new", "w")),
        tried(lambda: socket.create_connection(("127.0.0.1", 1), timeout=9)),
        sorted(set(os.environ) - {{"LC_CTYPE", "PWD"}}),
    ]
"""
    missing, *read_only, network, environment = programs.run(program, "f", [[]])[0]["value"]
    assert missing == "No such file or directory"
    assert read_only == ["Read-only file system"] * 2
    assert network in ("Connection refused", "Network is unreachable")  # of its own loopback
    assert environment == []
