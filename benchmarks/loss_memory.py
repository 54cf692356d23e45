"""Peak memory and time of one micro-batch's policy loss, with and without all logits at once.

``python -m benchmarks.loss_memory [--rows 4] [--length 512] [--vocabulary 151936] [--times 3]``

Forward and backward pass of a small trunk with a wide output layer, each variant in a process of
its own: first with the logits of all tokens, then for different numbers of logits alive at a time.
Memory is the process's highest resident size, torch and the model included, and what the passes add
to the size before them.
"""

import argparse
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from engine.memory.model import LOGITS_AT_ONCE
from engine.train.models.output_layer import OutputLayer
from engine.train.ppo import chunked_loss
from engine.train.ppo.chunked_loss import ChunkedLoss
from engine.train.ppo.logprobs import token_logprobs

ALL = "all"
POLL = 0.002
"""Seconds between two looks at the resident size."""


def main() -> None:
    """Prints a line per variant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options)
        return
    print(
        f"{options.rows} x {options.length} tokens, {options.vocabulary:,} words; "
        f"{torch.get_num_threads()} threads; in use: {LOGITS_AT_ONCE['cpu']:,} logits at a time"
    )
    for most in (ALL, *(str(1 << n) for n in (26, 25, 24, 23))):
        command = [sys.executable, "-m", "benchmarks.loss_memory", *sys.argv[1:], "--child", most]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{most:>12} logits  {done.stdout.strip()}", flush=True)


def measure(options: argparse.Namespace) -> None:
    """Prints the peak and the seconds of one variant."""
    model = build_model(options.vocabulary)
    tokens = torch.randint(options.vocabulary, (options.rows, options.length))
    if options.child != ALL:
        chunked_loss.MAX_LOGITS = int(options.child)
    step(model, tokens[:1, :8], options.child)  # what is made once
    model.zero_grad(set_to_none=False)
    before, peak, seconds = resident(), Peak(), []
    with peak:
        for _ in range(options.times):
            began = time.perf_counter()
            step(model, tokens, options.child)
            seconds.append(time.perf_counter() - began)
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"process {whole / 1e9:.2f} GB, passes {(peak.highest - before) / 1e9:.2f} GB, "
        f"{min(seconds):.2f} s"
    )


def build_model(vocabulary: int) -> Qwen2ForCausalLM:
    """A small trunk with random weights and a wide output layer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def step(model: Qwen2ForCausalLM, tokens: Tensor, most: str) -> None:
    """One forward and backward pass."""
    hidden = model.model(tokens).last_hidden_state
    if most == ALL:
        logprobs = token_logprobs(model.lm_head(hidden), tokens, 1.0)
        loss = clipped(logprobs.reshape(-1)).sum()
    else:
        task = ChunkedLoss(loss_of_chunk, True, tokens, 1.0, False)
        loss, _ = task(OutputLayer(model, torch.float32), hidden)
    loss.backward()


def clipped(logprobs: Tensor) -> Tensor:
    """A clipped objective at ratio 1."""
    ratio = (logprobs - logprobs.detach()).exp()
    return torch.max(-ratio, -ratio.clamp(0.8, 1.2))


def loss_of_chunk(
    _part: slice | None, logprobs: Tensor, _entropies: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :data:`~engine.train.ppo.chunked_loss.LossOfTokens`."""
    return clipped(logprobs).sum(), torch.zeros(1, dtype=torch.float64)


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The highest resident size within a context, looked at by a thread."""

    def __init__(self) -> None:
        self.highest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL):
            self.highest = max(self.highest, resident())


if __name__ == "__main__":
    main()
