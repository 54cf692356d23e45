"""Packages that a configuration needs and the installation may lack."""

from collections.abc import Iterator
from importlib.util import find_spec

from engine.config.rules.trackers import TRACKER_PACKAGES
from engine.config.schema import RunConfig


def missing_packages(config: RunConfig) -> list[str]:
    """Names what a run here lacks, a line for each key, without importing anything."""
    return [text for text, packages in _needed(config) if not any(map(find_spec, packages))]


def _needed(config: RunConfig) -> Iterator[tuple[str, list[str]]]:
    """What to say if none of some packages is installed, and the packages."""
    model, quantise = config.model, config.lora.quantise
    for name in config.log.trackers:
        package = TRACKER_PACKAGES.get(name, name.partition(":")[0].partition(".")[0])
        remedy = f"pip install {package}" if name in TRACKER_PACKAGES else "see PYTHONPATH"
        yield f"log.trackers: {name} is not installed here: {remedy}", [package]
    if quantise != "none":
        yield (
            f"lora.quantise: {quantise} needs the package bitsandbytes: "
            "pip install 'rlhf-tui[qlora]'",
            ["bitsandbytes"],
        )
    if model.attn_implementation == "flash_attention_2":
        yield (
            "model.attn_implementation: flash_attention_2 needs a GPU and the package flash-attn: "
            "pip install flash-attn",
            # transformers downloads the kernel with the other one.
            ["flash_attn", "kernels"],
        )
    if model.kernels == "liger":
        yield (
            "model.kernels: liger needs a GPU and the package liger-kernel: "
            "pip install 'rlhf-tui[gpu]'",
            ["liger_kernel"],
        )
