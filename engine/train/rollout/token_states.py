"""Hidden states of a model at the tokens of a step's responses."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TokenStates:
    """The hidden states that a reward model has before each token of the responses it scores.

    Filled where scores are computed (`model.value: reward_model`). Each rank has those of the rows
    that it scored.
    """

    rows: list[int] = field(default_factory=list)
    """Row indices of the responses in the batch."""
    states: list[Tensor] = field(default_factory=list)
    """Of each row, (length, 2, H) float32 on the device, at the position before each response
    token: the states after the last layer, which the score is made of, and those after the first
    half of the layers, each divided by their root mean square."""

    def clear(self) -> None:
        """Frees the states."""
        self.rows, self.states = [], []
