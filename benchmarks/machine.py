"""Describes the machine of a measurement, and measures its peak performance."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from engine.train.models.cpu_matmul import ONEDNN_IS_QUICKER, has_onednn, onednn_linear

PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy", "textual", "msgspec")


def describe() -> str:
    """Processor, GPU, memory and package versions, one line each."""
    lines = [f"processor   {_processor()}, {len(os.sched_getaffinity(0))} cores"]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        lines.append(f"GPU         {properties.name}, {properties.total_memory / 1e9:.0f} GB")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines.append(f"memory      {total / 1e9:.0f} GB")
    versions = ", ".join(f"{p} {v}" for p in PACKAGES if (v := _version(p)))
    lines.append(f"versions    Python {platform.python_version()}, {versions}")
    return "\n".join(lines)


def instruction_set() -> str:
    """What torch computes with: `AMX`, `AVX-512`, `AVX2`, or its own name for anything else."""
    used = torch.backends.cpu.get_cpu_capability()
    if used == "AVX512":
        return "AMX" if "amx_bf16" in _flags() else "AVX-512"
    return str(used)


def published_case(quicker: str) -> str:
    """Which of the published comparisons with TRL (RESULTS.md) this machine resembles.

    Args:
        quicker: `MKL` or `oneDNN`, the quicker one here in float32.
    """
    if quicker == "oneDNN" and ONEDNN_IS_QUICKER:
        return (
            "AVX-512 where oneDNN is quicker than MKL: 2.06x at equal work, 3.30x for the defaults"
        )
    if instruction_set() == "AVX2":
        return "AVX2: 1.14x to 1.30x at equal work, 1.77x to 2.23x for the defaults (3 machines)"
    return (
        f"none; {instruction_set()} where the engine and TRL both use MKL: expect a result between "
        "that of AVX2 (1.2x, defaults 1.8x) and that of AVX-512 with oneDNN (2.06x, 3.30x)"
    )


def cpu_case() -> str:
    """The speed of float32 products and of memory, and the published case; two lines."""
    mkl, onednn, copied = matmul_mkl(), matmul_onednn(), bandwidth_peak()
    quicker = "oneDNN" if onednn > mkl else "MKL"
    return (
        f"kind        {instruction_set()}; float32 products: MKL {mkl:.0f}, oneDNN {onednn:.0f} "
        f"GFLOP/s; {copied:.0f} GB/s copied\n"
        f"case        {published_case(quicker)}"
    )


def _flags() -> list[str]:
    info = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return next((x.split() for x in info if x.startswith("flags")), [])


def _processor() -> str:
    info = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    names = [x.partition(":")[2].strip() for x in info if x.startswith("model name")]
    flags = _flags()
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{names[0] if names else platform.machine()} ({', '.join(known)})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def free_gb() -> float:
    """Memory available to new processes, in GB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) * 1024 / 1e9


def best_of(times: int, function: Callable[[], object]) -> float:
    """The shortest duration of several calls after a warm-up, in seconds."""
    function()
    shortest = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def matmul_peak(dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of square matrix products, on the GPU if there is one.

    On a CPU the faster of MKL and oneDNN counts.
    """
    on_gpu = torch.cuda.is_available()
    n = 8192 if on_gpu else 1536
    a, b = (torch.randn(n, n, dtype=dtype, device="cuda" if on_gpu else "cpu") for _ in range(2))
    shortest = best_of(10, lambda: a @ b)
    if not on_gpu and ONEDNN_IS_QUICKER:
        shortest = min(shortest, best_of(10, lambda: onednn_linear(a, b)))
    return 2 * n**3 / shortest / 1e9


def matmul_mkl() -> float:
    """GFLOP/s of float32 products by torch's default on a CPU: MKL where it is built in."""
    return _gflops(lambda a, b: a @ b)


def matmul_onednn() -> float:
    """GFLOP/s of float32 products by oneDNN on a CPU; 0.0 if torch has none."""
    if not has_onednn():
        return 0.0
    return _gflops(onednn_linear)


def _gflops(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    n = 1536
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / best_of(5, lambda: product(a, b)) / 1e9


def bandwidth_peak() -> float:
    """GB/s read and written by a copy, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.zeros((1 << 30) if device == "cuda" else (1 << 26), device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / best_of(10, lambda: b.copy_(a)) / 1e9
