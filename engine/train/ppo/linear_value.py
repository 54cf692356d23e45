"""A value function that is linear in the hidden states of the reward model (`model.value`).

The reward model reads every response anyway, and its weights do not change. So the states cost
nothing more, and the function of them that predicts the returns best is the solution of a linear
system: no model is trained for the value, and no gradient of it reaches the policy.

A baseline fitted by least squares after each batch is that of Duan et al. 2016, arXiv 1604.06778,
and its library rllab. Here the penalty draws the weights towards those before the step instead of
towards 0, so that they remember earlier responses.

Shapes: N tokens of this rank's responses, H the width of the reward model, B responses of at most T
tokens.
"""

import torch
from torch import Tensor

from engine.train.distributed.ranks import RankGroup
from engine.train.ppo.advantages import Targets
from engine.train.rollout.token_states import TokenStates


def linear_values(
    weights: list[float], states: TokenStates, like: Tensor, ranks: RankGroup
) -> Tensor:
    """V before each token; (B, T) float32, 0 beyond a response's length. All ranks must call it.

    Args:
        weights: H weights and a bias.
        states: of this rank's rows.
        like: (B, T) float32, for shape and device.
        ranks: all ranks of this attempt.
    """
    values = torch.zeros_like(like)
    w = torch.tensor(weights, dtype=torch.float64, device=like.device)
    for row, x in zip(states.rows, states.states, strict=True):
        values[row, : len(x)] = (x.double() @ w[:-1] + w[-1]).float()
    return ranks.all_reduce_sum(values)


def fitted_weights(
    weights: list[float], states: TokenStates, targets: Targets, ranks: RankGroup
) -> list[float]:
    """The weights w' for the next step. All ranks must call it.

    w' minimises mean (x·w' − return)² + m·|w' − w|² over the tokens x of the batch, with m the mean
    square of the states; the bias has no penalty. So the batch counts as much as what w is made of
    in the directions in which states vary as much as on average, more in those in which they vary
    more, and less in others. The result depends on the number of ranks to rounding only.

    Costs N·H² multiplications in float64 and 8·H² bytes.

    Args:
        weights: w, H weights and a bias: those that the old values of the targets come from.
        states: of this rank's rows.
        targets: with returns and old values; (B, T) each.
        ranks: all ranks of this attempt.
    """
    if targets.returns is None or targets.old_values is None:
        raise TypeError("the advantage estimator has no value function")
    errors = (targets.returns - targets.old_values).double()
    size = len(weights)
    products = errors.new_zeros(size, size + 1)
    tokens = 0
    for row, states_of_row in zip(states.rows, states.states, strict=True):
        x = torch.nn.functional.pad(states_of_row.double(), (0, 1), value=1.0)
        products[:, :size] += x.T @ x
        products[:, size] += x.T @ errors[row, : len(x)]
        tokens += len(x)
    count = ranks.all_reduce_sum(torch.tensor([tokens], dtype=torch.float64, device=errors.device))
    products = ranks.all_reduce_sum(products) / count
    matrix, gradient = products[:, :size], products[:, size]
    squares = matrix.diagonal()[:-1]
    squares += squares.mean()  # in place, on the diagonal
    change: Tensor = torch.linalg.solve(matrix, gradient)
    return (torch.tensor(weights, dtype=torch.float64) + change.cpu()).tolist()
