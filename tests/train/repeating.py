"""An environment for tests: asks the same question a number of times."""


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

    def letters(self):
        """Another score."""
        return sum(map(len, self.heard)) / 10
