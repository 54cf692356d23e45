"""The pages that a user reads, and the commands and blocks of code in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from rlhf_tui.cli import MODULES

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("examples", "benchmarks")),
]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
PLACEHOLDER = re.compile(r"(?<![\w-])[A-Z]+(?:[:@][A-Z]+)?(?![\w(])…?")
VALUES = {
    "NAME": "finished", "SESSION": "finished", "OTHER": "killed", "NEW": "new", "STEP": "3",
    "N": "3", "HOST:PORT": "10.0.0.1:29400", "TEXT": "text", "CONFIG": "my-run.yaml",
    "FILE": "file.csv", "DIR": "folder", "SESSIONS": "sessions", "MODEL": "starter:policy",
    "RECIPE": "grpo",
}  # fmt: skip
"""What stands for a word in capitals. A word that is not here stands for itself."""


class Command(NamedTuple):
    """A command of rlhf-tui on a page."""

    words: tuple[str, ...]
    """The arguments, without `rlhf-tui`."""
    whole: bool
    """Whether it can be typed as it is, and does not only name a command or an option."""

    @property
    def text(self) -> str:
        """As it is typed."""
        return shlex.join(("rlhf-tui", *self.words))


def title(page: Path) -> str:
    """The page in the name of a test."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of code in some languages, without the indentation of the list they stand in."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [
        re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
        for indent, language, text in found
        if language in languages
    ]


def spans(page: Path) -> list[str]:
    """What stands in the text in backticks, each on one line."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in SPAN.findall(text)]


def shell_lines(page: Path) -> list[str]:
    """The commands of blocks, without comments; continued lines are joined."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    text = re.sub(r'"\$\((.*?)\)"', r"\1", text)  # eval "$(command)"
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def commands(page: Path) -> list[Command]:
    """The commands of rlhf-tui on a page: those of blocks, and those in backticks in the text."""
    found = [
        Command(given, whole=True)
        for line in shell_lines(page)
        for given in _after_program(shlex.split(_replaced(line), comments=True))
    ]
    for span in spans(page):
        begins = span.removeprefix("rlhf-tui ")
        first, _, rest = begins.partition(" ")
        # `metrics` may also be a section or a word of the text.
        if begins != span or (first in MODULES and re.match(r"[A-Z\[]|--", rest)):
            found.append(Command(tuple(shlex.split(_replaced(begins))), whole=False))
    return list(dict.fromkeys(found))


def _after_program(words: list[str]) -> list[tuple[str, ...]]:
    """The arguments of rlhf-tui in a line of the shell, up to a pipe or a redirection."""
    starts = [i for i, word in enumerate(words) if Path(word).name == "rlhf-tui"]
    if not starts:
        return []
    given = words[starts[0] + 1 :]
    end = next((i for i, word in enumerate(given) if word in ("|", ">", ">>", "&&")), len(given))
    return [tuple(given[:end])]


def _replaced(text: str) -> str:
    """The text with values for words in capitals, and what is optional in brackets given."""
    text = PLACEHOLDER.sub(lambda found: VALUES.get(found[0].rstrip("…"), found[0]), text)
    text = re.sub(r"\[([\w.-]+)\]", r"\1", text)
    return text.replace("-o …", "-o kl.beta=0.2").replace("…", "")
