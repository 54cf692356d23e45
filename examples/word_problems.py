"""Word problems in the form of GSM8K with a verifiable reward; no model and no human judges.

``python examples/word_problems.py`` writes ``word_problems.jsonl`` beside this file. Each row has a
prompt and, in the column ``answer``, a worked solution that ends in ``#### NUMBER``.
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Ben", "Chloe", "David", "Emma", "Felix", "Grace", "Hugo")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps")
INSTRUCTION = "Work it out step by step, then write the result as '#### NUMBER'."
RESULT = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
NUMBER = re.compile(r"-?[\d,]*\.?\d+")


def problem(numbers: random.Random) -> dict[str, Any]:
    """One row: `prompt`, as chat messages, and `answer`."""
    name, friend = numbers.sample(NAMES, 2)
    thing = numbers.choice(THINGS)
    boxes, each = numbers.randint(2, 9), numbers.randint(3, 12)
    given, found = numbers.randint(1, boxes * each - 1), numbers.randint(1, 20)
    left = boxes * each - given
    question = (
        f"{name} has {boxes} boxes of {each} {thing} each. {name} gives {given} of them to "
        f"{friend} and then finds {found} more. How many {thing} does {name} have now?"
    )
    solution = (
        f"{boxes} * {each} = {boxes * each} {thing} at first.\n"
        f"{boxes * each} - {given} = {left} are left.\n"
        f"{left} + {found} = {left + found}.\n#### {left + found}"
    )
    return {
        "prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        "answer": solution,
    }


def write(path: Path, count: int = 2000, seed: int = 0) -> None:
    """Writes a file of problems, the same ones for the same seed."""
    numbers = random.Random(seed)  # noqa: S311 - nothing secret
    rows = [json.dumps(problem(numbers)) for _ in range(count)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def correct(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 for a response whose result is that of the column `answer`, else 0.

    The result of a response is the number after ####, or the last number if there is none.
    """
    scores = []
    for completion, solution in zip(completions, answer, strict=True):
        found, wanted = result(text_of(completion)), result(solution)
        scores.append(float(found is not None and found == wanted))
    return scores


def well_formed(completions: list[Any], **_: Any) -> list[float]:
    """1 for a response that marks exactly one result with ####, else 0."""
    return [float(len(RESULT.findall(text_of(completion))) == 1) for completion in completions]


def text_of(completion: Any) -> str:
    """A response's text: of chat prompts it comes as a list of one message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def result(text: str) -> float | None:
    """The number that a text gives as its result; None if it has no number."""
    numbers = RESULT.findall(text) or NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".jsonl")
    write(target)
    sys.stdout.write(f"wrote {target}\n")
