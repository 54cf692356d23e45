"""Computes float32 matrix products on a CPU with the faster of two libraries.

torch's products use MKL, which takes its AVX2 path on non-Intel processors. With AVX-512, oneDNN,
which is also part of torch, is more than twice as fast: 480 against 210 GFLOP/s on two Zen 5 cores,
for all shapes of a training step, forward and backward. With only AVX2, MKL is faster except for an
output layer, where oneDNN takes 17 instead of 30 ms for 16 rows and 49,152 words on two Zen 3
cores. There MKL also divides products of a few rows badly among its threads. Computed as a batch of
products with 64 weight rows each, they take 0.4 to 0.95 of the time; the same 16 rows take 14 ms.

oneDNN first copies blocks of a weight (o, i), unless the numbers of one input are adjacent in
memory, as in the transpose of a matrix (i, o). Then 16 rows take 0.63 of the time and 312 rows 0.8
(layers of SmolLM2-135M, two Zen 5 cores). The gradient of x takes longer by as much, so this pays
off for weights that are not trained.

The results agree up to rounding. The choice depends only on the processor and the shape, so a
resumed run makes the same one.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def has_onednn() -> bool:
    """Whether torch has oneDNN's matrix product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _has_both_with(instructions: str) -> bool:
    """Whether torch has both MKL and oneDNN and uses the given instruction set."""
    return (
        torch.backends.cpu.get_cpu_capability() == instructions
        and torch.backends.mkl.is_available()
        and has_onednn()
    )


def _is_by_intel() -> bool:
    """Whether the processor is, or may be, made by Intel."""
    cpus = Path("/proc/cpuinfo")
    return not cpus.is_file() or "GenuineIntel" in cpus.read_text(errors="replace")


# Constants, because torch.compile (`rollout.compile`) does not trace cached functions.
ONEDNN_IS_QUICKER = _has_both_with("AVX512") and not _is_by_intel()
"""Whether oneDNN is faster than MKL on this machine."""
ONEDNN_IS_QUICKER_IF_WIDE = _has_both_with("AVX2")
"""Whether oneDNN is faster for layers with many outputs."""
WIDE = 1 << 14
"""Smallest number of outputs that counts as many."""
BLOCKS_ARE_QUICKER = ONEDNN_IS_QUICKER_IF_WIDE
"""Whether MKL computes a product of a few rows, as in decoding, faster as a batch of small ones."""
FEW_ROWS, BLOCK, LARGE = 32, 64, 1 << 18
"""Most rows; weight rows in each small product; elements of the smallest weight treated so."""


def onednn_is_quicker_for(weight: Tensor) -> bool:
    """Whether oneDNN is faster for the output of a layer with this weight, (o, i)."""
    return ONEDNN_IS_QUICKER or (ONEDNN_IS_QUICKER_IF_WIDE and weight.shape[0] >= WIDE)


def blocks_are_quicker_for(x: Tensor, weight: Tensor) -> bool:
    """Whether a batch of small products is faster for x (…, i) and a layer's weight (o, i)."""
    return (
        BLOCKS_ARE_QUICKER
        and x.shape[-1] < x.numel() <= FEW_ROWS * x.shape[-1]
        and weight.numel() >= LARGE
        and weight.shape[0] % BLOCK == 0
        and weight.is_contiguous()
    )


def quicker_transposed(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Returns the linear layers whose products are faster in :func:`transposed_order`.

    An output layer of many words gains little, and an embedding tied to it would be read column by
    column.
    """
    modules = list(modules)
    embedded = {m.weight for m in modules if isinstance(m, nn.Embedding)}
    # The exact type: subclasses may compute something else.
    linear = [m for m in modules if type(m) is nn.Linear and m.weight not in embedded]
    return [layer for layer in linear if _is_quicker_transposed(layer.weight)]


def _is_quicker_transposed(weight: Tensor) -> bool:
    plain = type(weight.data) is Tensor and weight.is_contiguous()  # not a shard
    return ONEDNN_IS_QUICKER and plain and _on_cpu(weight, weight) and len(weight) < WIDE


def transposed_order(weight: Tensor) -> Tensor:
    """Returns a copy of a weight (o, i) that is (i, o) in memory."""
    return weight.detach().t().contiguous().t()


def _product_in_blocks(x: Tensor, weight: Tensor) -> Tensor:
    blocks = weight.view(-1, BLOCK, weight.shape[1])
    y = torch.bmm(x.expand(len(blocks), -1, -1), blocks.transpose(1, 2))
    return y.transpose(0, 1).reshape(len(x), -1)


def layer_output(x: Tensor, weight: Tensor) -> Tensor:
    """The product x Wᵀ (n, o) of x (n, i) and a layer's weight W (o, i), without autograd."""
    if blocks_are_quicker_for(x, weight) and _on_cpu(x, weight):
        return _product_in_blocks(x, weight)
    if onednn_is_quicker_for(weight) and _on_cpu(x, weight):
        return onednn_linear(x, weight)
    return x @ weight.t()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The product x Wᵀ of x (n, i) and W (o, i), without autograd; either may be a view."""
    return onednn_linear(x, weight) if _by_onednn(x, weight) else x @ weight.t()


def add_product_(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """Adds x Wᵀ to a tensor (n, o), which may be of a wider dtype."""
    if total.dtype == x.dtype and not _by_onednn(x, weight):
        total.addmm_(x, weight.t())
    else:
        total += product(x, weight)


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product x Wᵀ by oneDNN, without autograd."""
    # torch.compile emits the same operator for a linear layer. It accepts transposed views.
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return ONEDNN_IS_QUICKER and _on_cpu(x, weight)


def _on_cpu(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
