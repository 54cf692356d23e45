"""AdamW with its two moments in 8 bits (`train.optimiser: adamw_8bit`).

A moment is stored as one byte per element and one float32 scale per block of elements. With blocks
of 256, both moments take 2.03 bytes per weight instead of 8 in float32. The byte is an index into a
table of values between -1 and 1 (0 and 1 for the second moment) that are dense near 0. An update
unpacks a few million elements at a time, computes in float32, and packs them again.

Source: Dettmers et al. 2022, arXiv 2110.02861 (block-wise dynamic quantisation). torchao's
`AdamW8bit` uses the same tables and, for equal blocks, gives the same results, but it compiles its
update for every weight shape, and its blocks cross shard boundaries. Here a block lies within one
row. FSDP2 shards rows, so the moments are sharded, saved and loaded like the weights, bit for bit
on any number of ranks.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from engine.train.distributed.sharding import local_tensor, zeros_by_rows

MAX_BLOCK = 256
"""Largest block size. The largest power of two up to this that divides a row is used."""
MIN_BLOCK = 8
"""With smaller blocks the scales would take more than half a byte per element."""
MIN_ELEMENTS = 4096
"""Weights with fewer elements keep float32 moments, as in the paper: packing saves little."""
AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Elements unpacked at a time: few enough for a CPU's cache, and on a GPU enough to make kernel
launches negligible. Each needs about 30 bytes of memory."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE_SUFFIX = "_scale"
"""Suffix of the name of a moment's scales."""
MIN_SCALE = 1e-30
"""Scale of a block of zeros."""
DECADES = 7


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose moments are held in 8 bits.

    A parameter's state uses the names of torch's AdamW (`step`, `exp_avg`, `exp_avg_sq`), plus the
    scales of each 8-bit moment, `exp_avg_scale` and `exp_avg_sq_scale`. For a sharded parameter,
    all except `step` are DTensors with the parameter's placement.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Creates an optimiser; a parameter's state is allocated by its first update.

        Args:
            params: float32 parameters, or groups of them.
            lr: learning rate; its value in `param_groups` may change between steps.
            betas: β1 and β2.
            eps: ε.
            weight_decay: decoupled, as in torch's AdamW.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state |= new_state(parameter)
        state["step"] += 1
        rates = _Rates.of(group, int(state["step"]))
        weight, gradient = local_tensor(parameter), local_tensor(gradient)
        moments = [local_tensor(state[name]) for name in MOMENTS]
        if not block_size(parameter.shape):
            _update_(weight, gradient, moments, rates)
        elif weight.numel():  # of a small sharded weight, some ranks have no rows
            scales = [local_tensor(state[name + SCALE_SUFFIX]) for name in MOMENTS]
            _update_packed_(weight, gradient, moments, scales, rates)


@dataclass(frozen=True)
class _Rates:
    """The scalars of an update, the same for all elements of a parameter."""

    beta1: float
    beta2: float
    step_size: float
    """The learning rate over the first moment's bias correction, 1 − β1ᵗ."""
    deviation_scale: float
    """The root of the second moment's bias correction, 1 − β2ᵗ."""
    eps: float
    decay: float
    """Factor on the weights: 1 − learning rate × weight decay."""

    @classmethod
    def of(cls, group: dict[str, Any], step: int) -> "_Rates":
        """Computes them for update `step`, from 1, of a parameter in a group."""
        (beta1, beta2), rate = group["betas"], group["lr"]
        return cls(
            beta1=beta1,
            beta2=beta2,
            step_size=rate / (1 - beta1**step),
            deviation_scale=math.sqrt(1 - beta2**step),
            eps=group["eps"],
            decay=1 - rate * group["weight_decay"],
        )


def block_size(shape: torch.Size) -> int:
    """Returns how many elements of a row share a scale; 0 if the moments stay float32."""
    size = math.gcd(math.prod(shape[1:]), MAX_BLOCK)
    return size if shape.numel() >= MIN_ELEMENTS and size >= MIN_BLOCK else 0


def scale_shape(shape: torch.Size) -> tuple[int, int]:
    """Returns the shape of a weight's scales: rows, blocks per row."""
    return shape[0], math.prod(shape[1:]) // block_size(shape)


def new_state(parameter: Tensor) -> dict[str, Tensor]:
    """Creates a parameter's state before its first update, sharded like the parameter."""
    # Always on the host: the bias corrections are Python numbers.
    state = {"step": torch.zeros((), device="cpu")}
    packed = bool(block_size(parameter.shape))
    for name in MOMENTS:
        state[name] = torch.zeros_like(parameter, dtype=torch.uint8 if packed else None)
        if packed:  # with scales of 0, any byte stands for 0
            state[name + SCALE_SUFFIX] = zeros_by_rows(parameter, scale_shape(parameter.shape))
    return state


def pack(numbers: Tensor, blocks: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Rounds numbers to the nearest table values, in blocks.

    Args:
        numbers: (n, m) float32, contiguous; non-negative unless `signed`.
        blocks: number of blocks per row, k.
        signed: whether to use the table with negative values.

    Returns:
        Indices into the table, (n, m) uint8; the largest absolute value in each block, (n, k)
        float32.
    """
    table = _table(numbers.device, signed)
    parts = numbers.view(len(numbers), blocks, -1)
    scales = parts.abs().amax(-1).clamp_(min=MIN_SCALE)
    shares = (parts / scales.unsqueeze(-1)).view(-1)
    halves = shares.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    indices = table.first.index_select(0, halves)
    indices += shares >= table.above.index_select(0, indices.int())
    return indices.view(numbers.shape), scales


def unpack(indices: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Inverts :func:`pack`; returns a new tensor, (n, m) float32."""
    values = _table(indices.device, signed).values
    numbers = values.index_select(0, indices.reshape(-1).int())
    return numbers.view(*scales.shape, -1).mul_(scales.unsqueeze(-1)).view(indices.shape)


@dataclass(frozen=True)
class _Table:
    """The table of quantised values, relative to the block's largest, with a fast nearest lookup.

    The upper 16 bits of a float32 define an interval so short that it contains at most one boundary
    between two table values. On a CPU, torch.bucketize would take eight times as long.
    """

    values: Tensor
    """Ascending; (256,) float32."""
    above: Tensor
    """The boundary above each value, ∞ above the last one; (256,) float32."""
    first: Tensor
    """The index of the value nearest to the smallest number of each interval; (65536,) uint8."""


@functools.cache
def _table(device: torch.device, signed: bool) -> _Table:
    """Builds the paper's dynamic data type.

    It contains 0, 1 and seven decades below 1. Each decade has twice as many values as the one
    below it, equally spaced.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2 ** (decade + (not signed))
        size = 10.0 ** (decade - DECADES + 1)
        middles = [size * (0.1 + 0.9 * (i + 0.5) / count) for i in range(count)]
        values += middles
        values += [-value for value in middles] if signed else []
    table = torch.tensor(sorted(values), dtype=torch.float64, device="cpu")
    borders = ((table[:-1] + table[1:]) / 2).float()
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu").roll(1 << 15)
    # The lower bits increase the magnitude: for negative numbers, setting them gives the smallest.
    smallest = (halves << 16) | torch.where(halves < 0, 0xFFFF, 0).int()
    first = torch.bucketize(smallest.view(torch.float32), borders, right=True)
    above = torch.cat([borders, borders.new_full((1,), math.inf)])
    return _Table(table.float().to(device), above.to(device), first.to(torch.uint8).to(device))


def _update_packed_(
    weight: Tensor,
    gradient: Tensor,
    moments: list[Tensor],
    scales: list[Tensor],
    rates: _Rates,
) -> None:
    """Updates a weight and its packed moments in place, some rows at a time."""
    rows = len(weight)
    weight, gradient = weight.view(rows, -1), gradient.reshape(rows, -1)
    moments = [moment.view(rows, -1) for moment in moments]
    blocks = scales[0].shape[1]
    at_once = max(1, AT_ONCE[weight.device.type] // weight.shape[1])
    for first in range(0, rows, at_once):
        part = slice(first, first + at_once)
        unpacked = [
            unpack(moment[part], scale[part], signed=name == MOMENTS[0])
            for name, moment, scale in zip(MOMENTS, moments, scales, strict=True)
        ]
        _update_(weight[part], gradient[part], unpacked, rates)
        for name, numbers, moment, scale in zip(MOMENTS, unpacked, moments, scales, strict=True):
            packed, largest = pack(numbers, blocks, signed=name == MOMENTS[0])
            moment[part].copy_(packed)
            scale[part].copy_(largest)


def _update_(weight: Tensor, gradient: Tensor, moments: list[Tensor], rates: _Rates) -> None:
    """AdamW's update of a weight and its float32 moments, in place."""
    average, average_square = moments
    weight.mul_(rates.decay)
    average.lerp_(gradient, 1 - rates.beta1)
    average_square.mul_(rates.beta2).addcmul_(gradient, gradient, value=1 - rates.beta2)
    size = average_square.sqrt().div_(rates.deviation_scale).add_(rates.eps)
    weight.addcdiv_(average, size, value=-rates.step_size)
