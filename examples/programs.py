"""Programming tasks with a verifiable reward: what the policy writes is run in a sandbox.

``python examples/programs.py`` writes ``programs.jsonl`` beside this file. Each row has a prompt,
the `name` of the function to write, and lists of `inputs` and `outputs`.

Programs run in bubblewrap, without a network, with no files except Python's own, and with limits of
time, memory and processes. Only the inputs enter the sandbox, and the function's results are
compared outside, so a program cannot earn a score by ending early or by changing the tests.
"""

import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS = 5
CODE = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)
RUNNER = """
import json, os, resource, sys
task = json.load(sys.stdin)
results = os.fdopen(os.dup(1), "w")
for stream in (0, 1, 2):
    os.dup2(os.open(os.devnull, os.O_RDWR), stream)
for limit, most in (("CPU", 5), ("AS", 2**29), ("FSIZE", 2**20), ("NPROC", 32)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))

def line(**result):
    print(json.dumps(result), file=results, flush=True)

def failed(error):
    line(error=f"{type(error).__name__}: {error}"[:200])

try:
    names = {"__name__": "program"}
    exec(task["program"], names)
    if task["name"] not in names:
        raise NameError("there is no function " + task["name"])
    function = names[task["name"]]
except BaseException as error:
    failed(error)
    sys.exit()
for arguments in task["inputs"]:
    try:
        line(value=function(*arguments))
    except BaseException as error:
        failed(error)
"""
"""Calls the function with each of the inputs; writes a line of JSON for each of its results."""

Result = dict[str, Any]
"""Of one call: `value`, or `error` as a text."""


def rewarded(
    completions: list[Any], name: list[str], inputs: list[Any], outputs: list[Any], **_: Any
) -> list[float]:
    """The share of calls with the right result, for each response."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(run, map(program_of, completions), name, inputs)
        return list(map(share, results, outputs))


class Programmer:
    """The environment of one response: the policy learns of the first wrong result."""

    def __init__(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        self._name, self._inputs, self._outputs = name, inputs, outputs
        self._share = 0.0

    def reply(self, text: str) -> str | None:
        """Gets each message of the policy; returns None once the program is right."""
        results = run(program_of(text), self._name, self._inputs)
        self._share = share(results, self._outputs)
        for arguments, result, output in zip(self._inputs, results, self._outputs, strict=False):
            if result != {"value": output}:
                call = f"{self._name}({', '.join(map(repr, arguments))})"
                did = result.get("error") or f"returned {repr(result['value'])[:200]}, not {output}"
                return f"{call}: {did}. Write the function again."
        return None if self._share == 1 else "The program took too long. Write it again."

    def right(self) -> float:
        """The score: the share of calls with the right result, of the last program."""
        return self._share


def program_of(completion: Any) -> str:
    """The last block of code of a response, or the whole text if there is none."""
    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
    blocks: list[str] = CODE.findall(text)
    return blocks[-1] if blocks else text


def share(results: list[Result], outputs: list[Any]) -> float:
    """How many results are right, of all that should be there."""
    right = sum(r == {"value": output} for r, output in zip(results, outputs, strict=False))
    return right / len(outputs)


def run(program: str, name: str, inputs: list[Any]) -> list[Result]:
    """Defines a function in the sandbox and calls it with each of the inputs.

    The list is shorter than `inputs` if the program cannot be started, takes too long, needs too
    much memory or ends.

    Raises:
        RuntimeError: there is no sandbox.
    """
    check_sandbox()
    return _run(program, name, inputs)[0]


@functools.cache
def check_sandbox() -> None:
    """Raises RuntimeError if no sandbox can be made here, so that the run pauses and tells why."""
    if not shutil.which("bwrap"):
        raise RuntimeError("install bubblewrap (the program bwrap) to run the policy's programs")
    results, errors = _run("def one(): return 1", "one", [[]])
    if results != [{"value": 1}]:
        raise RuntimeError(f"bubblewrap cannot make a sandbox here: {errors.strip()}")


def _run(program: str, name: str, inputs: list[Any]) -> tuple[list[Result], str]:
    """The results and what the sandbox wrote to its standard error."""
    task = json.dumps({"program": program, "name": name, "inputs": inputs})
    # In files, whose size RUNNER limits: a pipe would be read into the memory of the rank.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - in a sandbox
            sandboxed(), stdin=subprocess.PIPE, stdout=output, stderr=errors
        )
        try:
            process.communicate(task.encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # and with it all processes in the sandbox
            process.wait()
        output.seek(0)
        errors.seek(0)
        found = [result for line in output if (result := _result(line))]
        return found, errors.read().decode(errors="replace")


def _result(line: bytes) -> Result | None:
    """A line of RUNNER's; None for anything else that a program has written there."""
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) and result.keys() in ({"value"}, {"error"}) else None


def sandboxed() -> list[str]:
    """The command that runs RUNNER with bubblewrap."""
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    folders = ("/usr", "/lib", "/lib64", sys.base_prefix)
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"),
        *(word for folder in folders for word in ("--ro-bind-try", folder, folder)),
        *("--proc", "/proc", "--dev", "/dev", "--size", str(2**24), "--tmpfs", "/tmp"),  # noqa: S108
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"),  # noqa: S108
        *(str(python), "-I", "-c", RUNNER),
    ]


TASKS: dict[str, tuple[str, Callable[[list[int], int], Any]]] = {
    "sum_above": (
        "returns the sum of the numbers that are greater than {n}",
        lambda numbers, n: sum(x for x in numbers if x > n),
    ),
    "count_below": (
        "returns how many of the numbers are less than {n}",
        lambda numbers, n: sum(x < n for x in numbers),
    ),
    "multiples": (
        "returns a list of the numbers that can be divided by {n}, in the same order",
        lambda numbers, n: [x for x in numbers if x % n == 0],
    ),
    "largest": (
        "returns a list of the {n} largest numbers, the largest one first",
        lambda numbers, n: sorted(numbers, reverse=True)[:n],
    ),
    "rotated": (
        "returns the list with its first {n} elements moved to the end",
        lambda numbers, n: numbers[n:] + numbers[:n],
    ),
    "limited": (
        "returns the list with every number that is greater than {n} replaced by {n}",
        lambda numbers, n: [min(x, n) for x in numbers],
    ),
}


def task(numbers: random.Random) -> dict[str, Any]:
    """One row: `prompt`, as chat messages, `name`, `inputs` and `outputs`."""
    name = numbers.choice(list(TASKS))
    text, function = TASKS[name]
    n = numbers.randint(2, 9)
    lists = [[numbers.randint(-20, 20) for _ in range(n + extra)] for extra in range(6)]
    request = f"Write a Python function {name}(numbers) that {text.format(n=n)}."
    return {
        "prompt": [{"role": "user", "content": f"{request} Answer with one block of code."}],
        "name": name,
        "inputs": [[values] for values in lists],
        "outputs": [function(values, n) for values in lists],
    }


def write(path: Path, count: int = 1000, seed: int = 0) -> None:
    """Writes a file of tasks, the same ones for the same seed."""
    numbers = random.Random(seed)  # noqa: S311 - nothing secret
    rows = [json.dumps(task(numbers)) for _ in range(count)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".jsonl")
    write(target)
    sys.stdout.write(f"wrote {target}\n")
