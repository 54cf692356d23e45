"""An environment for tests, which asks the same question a number of times, and runs with it."""

from pathlib import Path

from engine.train.experience.generation import generate_rollout


class Repeating:
    """Replies `QUESTION` until the policy has had a number of turns that depends on the seed."""

    QUESTION = " What else?"

    def __init__(self, prompt, seed):
        self.prompt, self.seed = prompt, seed
        self.heard = []

    @property
    def most_turns(self):
        return 1 + self.seed % 3

    def reply(self, text):
        self.heard.append(text)
        return self.QUESTION if len(self.heard) < self.most_turns else None

    def turns(self):
        """A score."""
        return float(len(self.heard))

    def by_turn(self):
        """A score for each turn; of a response of two turns one number."""
        scores = [len(text) / 10 for text in self.heard]
        return sum(scores) if len(scores) == 2 else scores

    def letters(self):
        """Another score."""
        return sum(map(len, self.heard)) / 10


ENVIRONMENT = (
    "environment.factory=repeating:Repeating",
    f"environment.path={Path(__file__).parent}",
    "environment.max_tokens=40",
)
STOPS = 'rollout.stop=[" a", "the", " is", " and"]'
"""The starter rarely ends a response by itself before ten tokens."""
SCORED = ("reward.model=null", "reward.environment=letters")


def respond(run, step=1):
    return generate_rollout(run, step)


def conversations(rollout):
    """For each response the tokens after the prompt, and which of them the policy sampled."""
    found = rollout.conversation
    for i, (length, count) in enumerate(
        zip(found.lengths.tolist(), rollout.lengths.tolist(), strict=True)
    ):
        yield found.ids[i, :length].tolist(), found.positions[i, :count].tolist()
