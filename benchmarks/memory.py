"""Compares the memory planner's estimates with the measured peaks of real runs.

    python benchmarks/memory.py [--device cpu|cuda] [--only TEXT] [--threads N]

Each row is a run of two steps in processes of its own (`rlhf-tui demo --headless`). The estimate is
what the rank computes before it loads a model; the measured peak is its `perf/peak_memory_gb`
(resident memory on a CPU, torch's allocations on a GPU). Models have the named shapes, random
weights and the starter's tokenizer. An estimate assumes responses of the maximum length.

If a run fails, its row shows the error and the remaining rows are still measured. The exit code is
1 if a run failed or an estimate is off by more than a quarter. With `--device cuda` on a machine
without a GPU the program prints a message and exits with 0.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
)
from transformers.utils.logging import disable_progress_bar

from engine import starter
from engine.journal.reader import JournalReader
from engine.session.folder import SessionFolder

TOLERANCE = 0.25
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMOLLM2_135M = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, **SPECIAL,
)  # fmt: skip
QWEN_HALF_B = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, **SPECIAL,
)  # fmt: skip
WIDE = Qwen2Config(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, **SPECIAL,
)  # fmt: skip
SHAPES = {"smollm2": SMOLLM2_135M, "half-b": QWEN_HALF_B, "wide": WIDE}
SHORT = "ppo.epochs=1 train.save_every=0 log.tensorboard=false train.steps=2"
LONG = "rollout.temperature=4 "
"""A temperature at which the starter's responses reach the maximum length."""
Case = tuple[str, str]
"""A model's name and the settings of the run."""
ON_CPU: list[Case] = [
    ("starter", ""),
    ("starter", "ppo.advantage=reward"),
    ("starter", "model.value=separate"),
    ("starter", "model.dtype=bfloat16"),
    ("starter", LONG + "rollout.batch_size=128 rollout.max_new_tokens=96 ppo.micro_batch_size=64"),
    ("starter", LONG + "rollout.batch_size=512 rollout.max_new_tokens=64 ppo.micro_batch_size=4"),
    ("smollm2", "rollout.batch_size=8 rollout.max_new_tokens=16 ppo.micro_batch_size=4"),
    ("smollm2", "rollout.batch_size=32 rollout.max_new_tokens=24 ppo.micro_batch_size=16"),
    ("smollm2", "rollout.batch_size=8 rollout.max_new_tokens=96 ppo.micro_batch_size=2"),
    ("smollm2", "rollout.batch_size=8 rollout.max_new_tokens=16 model.value=separate"),
    ("smollm2", "rollout.batch_size=8 rollout.max_new_tokens=16 ppo.advantage=reward"),
    ("smollm2", "rollout.batch_size=8 rollout.max_new_tokens=16 model.dtype=bfloat16"),
    ("wide", "rollout.batch_size=8 rollout.max_new_tokens=256 ppo.minibatches=1"),
]
ON_GPU: list[Case] = [
    ("half-b", "rollout.batch_size=64 rollout.max_new_tokens=128 ppo.micro_batch_size=8"),
    ("half-b", "rollout.batch_size=64 rollout.max_new_tokens=64 model.dtype=bfloat16"),
    ("half-b", "rollout.batch_size=256 rollout.max_new_tokens=256 ppo.micro_batch_size=8"),
]


class RunError(Exception):
    """A run of a case failed; the message is what it printed last."""


def main() -> int:
    """Runs the cases and prints one row each. Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="select cases by name or settings"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU on this machine: the planner was not checked")
        return 0
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {device}\n")
    print(f"{'model':<9}{'estimate':>9}{'measured':>9}{'off':>8}  settings")
    worst, failed = 0.0, 0
    disable_progress_bar()  # it would stand within the table
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, (model, settings) in enumerate(ON_CPU if options.device == "cpu" else ON_GPU):
            if options.only not in f"{model} {settings}":
                continue
            always = f"{SHORT} launch.device={options.device} launch.threads={options.threads}"
            overrides = [*write_model(model, root), *always.split(), *settings.split()]
            try:
                estimate, measured = run(root, f"case-{number}", overrides)
            except RunError as error:
                failed += 1
                print(f"{model:<9}{'failed':>26}  {settings}\n  {error}", flush=True)
                continue
            off = estimate / measured - 1
            worst = max(worst, abs(off))
            print(f"{model:<9}{estimate:>9.2f}{measured:>9.2f}{off:>+8.0%}  {settings}", flush=True)
    print(f"\nGB; off by {worst:.0%} at most, {TOLERANCE:.0%} are allowed; {failed} failed")
    return int(worst > TOLERANCE or failed > 0)


def write_model(model: str, root: Path) -> list[str]:
    """Writes a policy and a reward model on first use; returns the settings that select them."""
    if model == "starter":
        return []
    policy, reward = root / model, root / f"{model}-reward"
    if not policy.exists():
        config = SHAPES[model]
        tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
        small = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=config.vocab_size, **(SPECIAL | {"num_labels": 1}),
        )  # fmt: skip
        for built, folder in (
            (AutoModelForCausalLM.from_config(config), policy),
            (LlamaForSequenceClassification(small), reward),
        ):
            built.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return [f"model.policy={policy}", f"reward.model={reward}"]


def run(root: Path, name: str, overrides: list[str]) -> tuple[float, float]:
    """Runs two steps; returns the estimate and the measured peak in GB. Raises RunError."""
    options = [word for override in overrides for word in ("-o", override)]
    # Through the interpreter: the command need not be installed beside it.
    command = [sys.executable, "-m", "rlhf_tui.cli", "demo", "--headless", "--name", name]
    done = subprocess.run(
        [*command, "--sessions", root / "sessions", *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        output = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise RunError("\n  ".join([f"exit code {done.returncode}", *output[-5:]]))
    with JournalReader(SessionFolder(root / "sessions" / name)) as reader:
        ready = next((e.as_json() for e in reader.events() if e.kind == "ready"), {})
        measured = max(
            (v for _, v in reader.metrics.series("perf/peak_memory_gb") if v is not None),
            default=0.0,
        )
    if "planned_memory_gb" not in ready or not measured:
        raise RunError("the journal holds no estimate or no measured peak")
    return float(ready["planned_memory_gb"]), measured


if __name__ == "__main__":
    sys.exit(main())
