"""Does the engine learn as much from an episode as TRL's PPOTrainer?

    python -m benchmarks.learning_vs_trl [--seeds 5] [--steps 40] [--sides trl shared ...] [--out F]

Trains the starter policy on the starter task with both, from the same weights, with the same number
of episodes, prompts of the same file, the same length, epochs, learning rate and fixed beta, and
the same number of optimiser steps, which each side counts. All else is each side's default. A side
with a seed is a process of its own with one thread; its curve is appended to the file `--out`, and
one that is there already is not computed again.

TRL's accelerator makes one optimiser step of `gradient_accumulation_steps` micro-batches, however
many minibatches they are in: `num_mini_batches` alone adds none. With one micro-batch of the size
of the whole batch each minibatch is a step. TRL's value model starts from the reward model, as in
its example.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import machine
from benchmarks.learning import run_metrics
from benchmarks.side import OFFLINE
from engine import starter

EPISODES, NEW_TOKENS, EPOCHS, MINIBATCHES = 64, 32, 2, 2
BETA, LEARNING_RATE = 0.05, 1e-4
FROM_REWARD_MODEL = ["model.value=separate", "ppo.value_init=reward_model"]
OURS = {
    "shared": [],
    "separate": ["model.value=separate"],
    "reward-model": FROM_REWARD_MODEL,
    "as-trl": [
        *FROM_REWARD_MODEL, "ppo.value_clip=0.2", "train.adam_eps=1e-8", "ppo.max_grad_norm=1e6",
    ],
}  # fmt: skip
"""The engine's sides: the settings of each. `as-trl` has the settings in which TRL's defaults
differ from the engine's: start and clip of the value function, AdamW's ε, no clipped gradients.
"""
SIDES = ("trl", *OURS)
LEVELS = (1.8, 2.0)
SMOOTHED = 3
"""Steps of the mean that must reach a level."""


@dataclass(frozen=True)
class Curve:
    """One run of a side; a value per step in each list."""

    side: str
    seed: int
    scores: list[float]
    kl: list[float]
    cpu: list[float]
    """Processor seconds since the start of training."""
    updates: int
    """Optimiser steps of the whole run."""

    def cut(self, steps: int) -> "Curve":
        """The first steps alone."""
        updates = self.updates * steps // len(self.scores)
        parts = (values[:steps] for values in (self.scores, self.kl, self.cpu))
        return Curve(self.side, self.seed, *parts, updates)

    def objective(self, part: slice = slice(None)) -> float:
        """The mean of score − β·KL over a part of the steps."""
        pairs = zip(self.scores[part], self.kl[part], strict=True)
        return statistics.mean(score - BETA * kl for score, kl in pairs)

    def reached(self, level: float) -> int | None:
        """The first step (from 0) at which the smoothed score is at least `level`."""
        for end in range(SMOOTHED, len(self.scores) + 1):
            if statistics.mean(self.scores[end - SMOOTHED : end]) >= level:
                return end - 1
        return None


class Recorder:
    """Collects a run's curve and counts the steps of its optimiser."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.kl: list[float] = []
        self.cpu: list[float] = []
        self.updates = 0
        self._began = time.process_time()
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_args: Any) -> None:
        self.updates += 1

    def step(self, metrics: dict[str, float]) -> None:
        """Records the metrics of a step."""
        self.scores.append(metrics["objective/scores"])
        self.kl.append(metrics["objective/kl"])
        self.cpu.append(time.process_time() - self._began)

    def curve(self, side: str, seed: int) -> Curve:
        """What was recorded."""
        return Curve(side, seed, self.scores, self.kl, self.cpu, self.updates)


def run_ours(side: str, seed: int, steps: int) -> Curve:
    """Trains with the engine."""
    settings = [
        f"rollout.batch_size={EPISODES}", f"rollout.max_new_tokens={NEW_TOKENS}",
        f"ppo.epochs={EPOCHS}", f"ppo.minibatches={MINIBATCHES}", "kl.controller=fixed",
        f"kl.beta={BETA}", f"train.learning_rate={LEARNING_RATE}", "launch.threads=1",
        "launch.nice=0", *OURS[side],
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = run_metrics(Path(folder), seed, steps, settings)
        recorder = Recorder()
        for metrics in run:
            recorder.step(metrics)
    return recorder.curve(side, seed)


def run_trl(seed: int, steps: int) -> Curve:
    """Trains with TRL's PPOTrainer."""
    from datasets import Dataset  # noqa: PLC0415 - only this side needs these
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: PLC0415

    torch.set_num_threads(1)
    policy, reward = starter.resolve("starter:policy"), starter.resolve("starter:reward")
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    lines = Path(starter.resolve("starter:prompts")).read_text().splitlines()
    rows = [{"input_ids": tokenizer(json.loads(x)["prompt"])["input_ids"]} for x in lines]
    recorders: list[Recorder] = []

    class Record(TrainerCallback):
        """Passes on what the trainer logs."""

        def on_train_begin(self, *_args: Any, **_named: Any) -> None:
            recorders.append(Recorder())

        def on_log(self, *_args: Any, logs: dict[str, float], **_named: Any) -> None:
            if "objective/scores" in logs:
                recorders[0].step(logs)

    def load(kind: Any, name: str, **more: Any) -> Any:
        return kind.from_pretrained(name, dtype=torch.float32, **more)

    with tempfile.TemporaryDirectory() as out:
        settings = PPOConfig(
            output_dir=out,
            per_device_train_batch_size=EPISODES,
            gradient_accumulation_steps=1,
            num_mini_batches=MINIBATCHES,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=EPISODES,
            response_length=NEW_TOKENS,
            stop_token="eos",
            temperature=1.0,
            kl_coef=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            total_episodes=steps * EPISODES,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            seed=seed,
            use_cpu=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_list(rows)
        PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=load(AutoModelForCausalLM, policy),
            ref_model=load(AutoModelForCausalLM, policy),
            reward_model=load(AutoModelForSequenceClassification, reward, num_labels=1),
            value_model=load(AutoModelForSequenceClassification, reward, num_labels=1),
            train_dataset=data,
            eval_dataset=data,
            callbacks=[Record()],
        ).train()
    return recorders[0].curve("trl", seed)


def child(side: str, seed: int, steps: int, out: Path) -> None:
    """Trains one side with one seed, and appends its curve to `out`."""
    curve = run_trl(seed, steps) if side == "trl" else run_ours(side, seed, steps)
    with out.open("a") as file:
        file.write(json.dumps(asdict(curve)) + "\n")


def read(out: Path, steps: int) -> list[Curve]:
    """The curves in a file that have at least `steps` steps, cut to these."""
    lines = out.read_text().splitlines() if out.exists() else []
    curves = [Curve(**json.loads(line)) for line in lines]
    return [c.cut(steps) for c in curves if len(c.scores) >= steps]


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--out", type=Path, help="where curves are kept; default: nowhere")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]), options.steps, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "curves.jsonl"
        for seed in range(options.seeds):
            for side in options.sides:
                done = {(c.side, c.seed) for c in read(out, options.steps)}
                if (side, seed) not in done:
                    start(side, seed, options.steps, out)
        curves = read(out, options.steps)
    print_table(curves, options.sides, options.steps)


def start(side: str, seed: int, steps: int, out: Path) -> None:
    """Runs a side in a process of its own."""
    print(f"{side}, seed {seed}", file=sys.stderr, flush=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.learning_vs_trl"]
    command += ["--child", side, str(seed), "--steps", str(steps), "--out", str(out)]
    environment = os.environ | OFFLINE | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def print_table(curves: list[Curve], sides: list[str], steps: int) -> None:
    """Prints a row for each side: means over seeds ± standard errors."""
    last = slice(-(steps // 4), None)
    print(machine.describe())
    print(
        f"\n{steps} steps of {EPISODES} episodes, beta {BETA}, learning rate {LEARNING_RATE}, "
        f"{EPOCHS} epochs of {MINIBATCHES} minibatches; mean ± standard error over seeds\n"
    )
    print(
        f"{'':<14}{'seeds':>6}{'updates':>9}{'objective':>16}{'last quarter':>16}{'less TRL':>16}"
        f"{'score':>16}{'KL':>14}" + "".join(f"{f'CPU s to {level}':>20}" for level in LEVELS)
    )
    trl = [c.objective(last) for c in curves if c.side == "trl"]
    for side in sides:
        runs = [c for c in curves if c.side == side]
        if not runs:
            continue
        columns = [
            f"{len(runs):>6}",
            f"{'/'.join(map(str, sorted({c.updates for c in runs}))):>9}",
            f"{spread([c.objective() for c in runs]):>16}",
            f"{spread([c.objective(last) for c in runs]):>16}",
            f"{difference([c.objective(last) for c in runs], trl):>16}",
            f"{spread([statistics.mean(c.scores[last]) for c in runs]):>16}",
            f"{spread([statistics.mean(c.kl[last]) for c in runs]):>14}",
            *(f"{time_to(runs, level):>20}" for level in LEVELS),
        ]
        print(f"{side:<14}" + "".join(columns))


def time_to(runs: list[Curve], level: float) -> str:
    """Processor seconds until the smoothed score reaches a level, in the runs that reach it."""
    ends = [(c, c.reached(level)) for c in runs]
    times = [c.cpu[end] for c, end in ends if end is not None]
    if not times:
        return f"none of {len(runs)}"
    missing = "" if len(times) == len(runs) else f" ({len(times)}/{len(runs)})"
    return spread(times, 0) + missing


def difference(ours: list[float], theirs: list[float]) -> str:
    """The difference of the means ± its standard error; empty if there are not enough runs."""
    if min(len(ours), len(theirs)) <= 1:
        return ""
    errors = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    return f"{statistics.mean(ours) - statistics.mean(theirs):+.3f} ± {math.sqrt(sum(errors)):.3f}"


def spread(values: list[float], digits: int = 3) -> str:
    """The mean ± its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


if __name__ == "__main__":
    main()
