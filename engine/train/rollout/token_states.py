"""Hidden states of a model at the response tokens of a step."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TokenStates:
    """The hidden states of a reward model before each token of the responses it scores.

    Filled while scores are computed (`model.value: reward_model`). Each rank holds the states of
    the rows it scored.
    """

    rows: list[int] = field(default_factory=list)
    """Row indices of the responses in the batch."""
    states: list[Tensor] = field(default_factory=list)
    """For each row, (length, 2, H) float32 on the device, at the position before each response
    token: the states after the last layer, from which the score is computed, and those after the
    first half of the layers, each divided by their root mean square."""

    def clear(self) -> None:
        """Frees the states."""
        self.rows, self.states = [], []
