"""Tools for tests, and the keys of a run that has one."""

from pathlib import Path

FOLDER = str(Path(__file__).parent)
CHAT = (
    "{% if tools %}<tools>{{ tools[0].function.name }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATTING = (
    f"data.chat_template='{CHAT}'", "data.chat=true", f"environment.path={FOLDER}",
    "environment.max_tokens=120", "environment.tools=['arithmetic:add']",
    # The starter has never seen a call: each of its turns is taken for one.
    "environment.call_pattern='(?s)^(.*)$'", 'rollout.stop=[" a", "the", " is", " and"]',
)  # fmt: skip


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def collect(item: str) -> list[str]:
    """
    Puts a text into a list.

    Args:
        item: The text.
    """
    return [item]


def echo(text: str) -> str:
    """
    Says a text again.

    Args:
        text: The text.
    """
    return text


def leave() -> None:
    """Ends the program."""
    raise SystemExit(3)


def untyped(a):
    """Has no type hints."""


class Game:
    """An environment with a tool of its own."""

    def __init__(self):
        self.looked = 0

    def look(self) -> str:
        """Looks around."""
        self.looked += 1
        return f"you have looked {self.looked} times"

    def solved(self):
        """A score."""
        return float(self.looked > 0)


class Tally(Game):
    """An environment with a score for each turn that called tools."""

    def __init__(self):
        super().__init__()
        self.scores = []

    async def called_tools(self, text, results):
        """A call that failed is worth its number of results, and a call of no text nothing."""
        self.scores.append(float(len(results)) if text and "error" in results[0] else 0.0)

    def by_turn(self):
        """The scores of the turns."""
        return self.scores
