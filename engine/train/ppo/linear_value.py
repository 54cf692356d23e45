"""A value function that is linear in the hidden states of the reward model (`model.value`).

The reward model reads every response anyway and its weights do not change, so its hidden states
come for free. The linear function of them that best predicts the returns is the solution of a
linear system: no value model has to be trained, and no value gradient reaches the policy.

Fitting a baseline to a batch by least squares follows Duan et al. 2016, arXiv 1604.06778, and its
library rllab, which also uses the position and its square as features. There are two differences.
The penalty pulls the weights towards those before the step instead of towards 0, so that they
remember earlier responses. And the values of a response come from a fit to the other responses,
because a baseline must not depend on the response it is subtracted from.

Shapes: N tokens in a step's responses, H the width of the reward model, B responses of at most T
tokens, D = 3·H + 3 features.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.train.distributed.ranks import RankGroup
from engine.train.ppo.advantages import AdvantageInputs, make_targets
from engine.train.rollout.token_states import TokenStates

RIDGE_PENALTY = 3.0
"""Weight of the penalty on changing the weights, in units of their features' mean squares."""
BIAS_PENALTY = 1e-6
"""The same for the bias: it may change freely, but the system is solvable without any response."""


@dataclass(frozen=True)
class LinearFit:
    """The value function fitted to a step's responses."""

    weights: list[float]
    """Weights of the D features, fitted to all responses; used for the next step."""
    values: Tensor
    """V before each token; (B, T) float32, 0 beyond a response's length. The values of each
    response come from a fit to all other responses."""


def fit_linear_value(
    weights: list[float],
    states: TokenStates,
    inputs: AdvantageInputs,
    ranks: RankGroup,
    positions: int,
) -> LinearFit:
    """Fits V to the returns of a step's responses. All ranks must call it.

    The weights w' minimise mean (x·w' − return)² + Σ p·(w' − w)² over the tokens x of the batch. p
    is three times the mean square of the features of the same kind: the last layer's states, the
    middle layer's, and so on. So the batch counts as much as w in directions where the states vary
    three times as much as the average, more where they vary more, and less where they vary less.
    The returns are computed by the estimator from the values under w.

    Leaving out a response does not require another fit. Its errors on that response's tokens are (I
    − X·A⁻¹·Xᵀ)⁻¹ times those of the whole fit, where X are the tokens' features and A is the matrix
    of the whole system. These are the leave-one-out residuals of ridge regression, with all tokens
    of a response left out together. The result depends on the number of ranks only by rounding.

    Takes about 3·N·D² multiplications in float64 and 24·D² bytes.

    Args:
        weights: w, one weight for each of the D features.
        states: the hidden states of this rank's rows.
        inputs: the advantage estimator's inputs, the same on every rank; their values are not read.
        ranks: all ranks of this attempt.
        positions: the divisor of positions; the same for these weights in all steps.
    """
    w = torch.tensor(weights, dtype=torch.float64, device=inputs.mask.device)
    before = torch.zeros_like(inputs.old_logprobs)
    for row, x in _rows(states, positions):
        before[row, : len(x)] = (x @ w).float()
    before = ranks.all_reduce_sum(before)
    returns = make_targets(dataclasses.replace(inputs, values=before)).returns
    if returns is None:
        raise TypeError("the advantage estimator has no value function")
    errors = (returns - before).double()

    products = errors.new_zeros(len(w), len(w) + 1)
    for row, x in _rows(states, positions):
        products[:, :-1] += x.T @ x
        products[:, -1] += x.T @ errors[row, : len(x)]
    tokens = int(inputs.lengths.sum())
    products = ranks.all_reduce_sum(products) / tokens
    matrix, gradient = products[:, :-1], products[:, -1:]
    matrix.diagonal().add_(_penalties(matrix.diagonal()))
    factor = torch.linalg.cholesky(matrix)
    change = torch.cholesky_solve(gradient, factor)[:, 0]

    values = torch.zeros_like(before)
    for row, x in _rows(states, positions):
        root = torch.linalg.solve_triangular(factor, x.T, upper=False)
        hat = root.T @ root / tokens  # the block of the hat matrix: X·A⁻¹·Xᵀ
        residuals = errors[row, : len(x)] - x @ change
        identity = torch.eye(len(x), dtype=hat.dtype, device=hat.device)
        # Not `solve`, which waits for the GPU to find out whether the matrix is singular.
        without = torch.linalg.solve_ex(identity - hat, residuals).result
        values[row, : len(x)] = returns[row, : len(x)] - without.float()
    return LinearFit((w + change).tolist(), ranks.all_reduce_sum(values))


def features(states: Tensor, positions: int) -> Tensor:
    """Computes the features of V, which is linear in them.

    In this order: the last layer's states, the middle layer's, the last layer's times the position
    in the response (from -1 to 1), the position (from 0 to 1), its square, and 1.

    Args:
        states: hidden states of T tokens; (T, 2, H), see :class:`TokenStates`.
        positions: what a position is divided by.

    Returns:
        (T, D) float64.
    """
    last, middle = states.double().unbind(1)
    position = torch.arange(len(last), dtype=last.dtype, device=last.device)[:, None] / positions
    return torch.cat(
        [last, middle, last * (2 * position - 1), position, position**2, torch.ones_like(position)],
        dim=1,
    )


def with_all_features(weights: list[float]) -> list[float]:
    """Extends H weights of the last layer's states and a bias to D weights of equal effect."""
    *last, bias = weights
    return [*last, *[0.0] * (2 * len(last) + 2), bias]


def _rows(states: TokenStates, positions: int) -> Iterator[tuple[int, Tensor]]:
    """Yields rows with their features, which are not kept: they are six times the states' size."""
    for row, x in zip(states.rows, states.states, strict=True):
        yield row, features(x, positions)


def _penalties(squares: Tensor) -> Tensor:
    """The penalty of each feature; (D,) → (D,). `squares` are the features' mean squares."""
    width = (len(squares) - 3) // 3
    kinds = squares.split([width, width, width, 1, 1, 1])
    penalties = [RIDGE_PENALTY * kind.mean().expand_as(kind) for kind in kinds[:-1]]
    bias = torch.full_like(kinds[-1], BIAS_PENALTY)
    return torch.cat([*penalties, bias]).clamp(min=BIAS_PENALTY)
