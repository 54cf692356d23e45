"""The starter models: a small policy, a small reward model and prompts, so that a run needs no hub.

Their card, `CARD.md`, says what they are made of. `starter:policy`, `starter:reward` and
`starter:prompts` name them in a configuration; `starter:demo` is one that uses them.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
PREFIX = "starter:"
PARTS = {"policy": "policy", "reward": "reward", "prompts": "prompts.jsonl", "demo": "demo.yaml"}


def resolve(name: str) -> str:
    """`starter:policy` as a path; any other name as it is."""
    if not name.startswith(PREFIX):
        return name
    part = name.removeprefix(PREFIX)
    return str(FOLDER / PARTS[part]) if part in PARTS else name
