"""The memory planner against what runs really took: a table, and an exit code.

    python benchmarks/memory.py [--device cpu|cuda] [--only TEXT] [--threads N]

Each row is a run of its own processes (`rlhf-tui demo --headless`, two steps): the estimate is the
one its rank made before it loaded any model, the measured peak its `perf/peak_memory_gb` (on a CPU
what was resident at most, on a GPU what torch allocated at most). Models have random weights in the
shapes named, and the starter's tokenizer. An estimate is for answers as long as the limit allows.

Exits with 1 where an estimate is off by over a quarter; with `--device cuda` on a machine without a
GPU it says so and exits with 0.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from engine import starter
from engine.journal.reader import JournalReader
from engine.session.folder import Session

TOLERANCE = 0.25
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMOLLM2_135M = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, **SPECIAL,
)  # fmt: skip
QWEN_HALF_B = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, **SPECIAL,
)  # fmt: skip
SHORT = "ppo.epochs=1 train.save_every=0 log.tensorboard=false train.steps=2"
LONG = "rollout.temperature=4 "
"""The starter ends its answers long before the limit; hot enough, it does not."""
Case = tuple[str, str]
"""A model's name and the settings that make the case."""
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
]
ON_GPU: list[Case] = [
    ("half-b", "rollout.batch_size=64 rollout.max_new_tokens=128 ppo.micro_batch_size=8"),
    ("half-b", "rollout.batch_size=64 rollout.max_new_tokens=64 model.dtype=bfloat16"),
    ("half-b", "rollout.batch_size=256 rollout.max_new_tokens=256 ppo.micro_batch_size=2"),
]


def main() -> int:
    """Runs the cases. Returns the exit code."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments.add_argument("--only", default="", help="cases whose name and settings hold this")
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use here: the planner was not checked on one")
        return 0
    where = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}\n")
    print(f"{'model':<9}{'estimate':>9}{'measured':>9}{'off':>8}  settings")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, (model, settings) in enumerate(ON_CPU if given.device == "cpu" else ON_GPU):
            if given.only not in f"{model} {settings}":
                continue
            always = f"{SHORT} launch.device={given.device} launch.threads={given.threads}"
            options = [*make(model, root), *always.split(), *settings.split()]
            estimate, measured = run(root, f"case-{number}", options)
            off = estimate / measured - 1
            worst = max(worst, abs(off))
            print(f"{model:<9}{estimate:>9.2f}{measured:>9.2f}{off:>+8.0%}  {settings}", flush=True)
    print(f"\nGB; off by {worst:.0%} at most, {TOLERANCE:.0%} are allowed")
    return int(worst > TOLERANCE)


def make(model: str, root: Path) -> list[str]:
    """The settings that name a model; it is made when it is first asked for."""
    if model == "starter":
        return []
    policy, reward = root / model, root / f"{model}-reward"
    if not policy.exists():
        config = {"smollm2": SMOLLM2_135M, "half-b": QWEN_HALF_B}[model]
        kind = LlamaForCausalLM if model == "smollm2" else Qwen2ForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
        small = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=config.vocab_size, num_labels=1, **SPECIAL,
        )  # fmt: skip
        for built, folder in (
            (kind(config), policy),
            (LlamaForSequenceClassification(small), reward),
        ):
            built.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return [f"model.policy={policy}", f"reward.model={reward}"]


def run(root: Path, name: str, options: list[str]) -> tuple[float, float]:
    """A run of two steps: its estimate and its measured peak, GB."""
    words = [w for option in options for w in ("-o", option)]
    command = [Path(sys.executable).with_name("rlhf-tui"), "demo", "--headless", "--name", name]
    done = subprocess.run(
        [*command, "--sessions", root / "sessions", *words],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    with JournalReader(Session(root / "sessions" / name)) as record:
        ready = next(e for e in record.events() if e.kind == "ready").as_json()
        measured = max(v for _, v in record.series("perf/peak_memory_gb"))
    return float(ready["planned_memory_gb"]), measured


if __name__ == "__main__":
    sys.exit(main())
