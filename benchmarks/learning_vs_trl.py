"""Does the engine learn as much from an episode as TRL's PPOTrainer?

    python -m benchmarks.learning_vs_trl [--seeds 5] [--steps 24] [--sides trl shared ...] [--out F]
                                         [--workers 1] [--seconds S]

Trains the starter policy on the starter task with both, from the same weights, with the same number
of episodes, the same prompts to train on, the same length, epochs, learning rate and fixed beta,
and the same number of optimiser steps, which each side counts. All else is each side's default. A
side with a seed is a process of its own with one thread; its curve is appended to the file `--out`,
and one that is there already is not computed again.

A third of the prompts is never trained on. Every eighth step the policy of either side responds to
these several times, with the engine's sampler and the same random numbers: the scores of a step's
64 samples are too noisy to compare the sides by.

TRL's accelerator makes one optimiser step of `gradient_accumulation_steps` micro-batches, however
many minibatches they are in: `num_mini_batches` alone adds none. With one micro-batch of the size
of the whole batch each minibatch is a step. TRL's value model starts from the reward model, as in
its example.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import machine
from benchmarks.learning import load_starter_run
from benchmarks.learning_curves import BETA, Curve, print_table, read
from benchmarks.side import NO_TRL, OFFLINE, has_ppo_trainer
from engine import metrics as names
from engine import starter
from engine.train.evaluation.evaluate import evaluate
from engine.train.run import Run
from engine.train.step import train_step

EPISODES, NEW_TOKENS, EPOCHS, MINIBATCHES = 64, 32, 2, 2
LEARNING_RATE = 1e-4
HELD_OUT = 3
"""Every such prompt is held out."""
PER_PROMPT, EVALUATED_EVERY = 4, 8
FROM_REWARD_MODEL = ["model.value=separate", "ppo.value_init=reward_model"]
OURS = {
    "shared": [],
    "fitted": ["model.value=reward_model"],
    "reward-model": FROM_REWARD_MODEL,
    "as-trl": [
        *FROM_REWARD_MODEL, "ppo.value_clip=0.2", "train.adam_eps=1e-8", "ppo.max_grad_norm=1e6",
    ],
    "separate": ["model.value=separate"],
}  # fmt: skip
"""The engine's sides: the settings of each. `as-trl` has the settings in which TRL's defaults
differ from the engine's: start and clip of the value function, AdamW's ε, no clipped gradients.
"""
SIDES = ("trl", *OURS)
RECORDED = (
    "objective/entropy", "val/num_eos_tokens", "loss/value_avg", "policy/approxkl_avg",
    "policy/clipfrac_avg",
)  # fmt: skip
"""Metrics of both sides that are kept to explain a difference."""


class Recorder:
    """Collects a run's curve and counts the steps of its optimiser."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.cpu: list[float] = []
        self.held_out: list[tuple[int, float, float]] = []
        self.updates = 0
        self._began = time.process_time()
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_args: Any) -> None:
        self.updates += 1

    def step(self, metrics: dict[str, float]) -> None:
        """Records the metrics of a step."""
        self.metrics.append(metrics)
        self.cpu.append(time.process_time() - self._began)

    def evaluate_if_due(self, run: Run) -> None:
        """Evaluates the run's policy after some of the steps, outside the time of training."""
        step = len(self.metrics)
        if step % EVALUATED_EVERY or run.held_out is None:
            return
        before = time.process_time()
        found = evaluate(run, run.held_out, step).metrics
        self.held_out.append((step, found[names.EVAL_SCORE], found[names.EVAL_KL]))
        self._began += time.process_time() - before

    def curve(self, side: str, seed: int) -> Curve:
        """What was recorded."""
        scores, kl = (
            [m[name] for m in self.metrics] for name in ("objective/scores", "objective/kl")
        )
        others = {n: [m.get(n, math.nan) for m in self.metrics] for n in RECORDED}
        return Curve(side, seed, scores, kl, self.cpu, self.updates, self.held_out, others)


def load_ours(folder: Path, seed: int, steps: int, settings: list[str]) -> Run:
    """A run of the engine with the prompts split."""
    lines = Path(starter.resolve("starter:prompts")).read_text().splitlines(keepends=True)
    trained, held_out = folder / "prompts.jsonl", folder / "held_out.jsonl"
    held_out.write_text("".join(lines[::HELD_OUT]))
    trained.write_text("".join(line for i, line in enumerate(lines) if i % HELD_OUT))
    return load_starter_run(
        folder, seed, steps,
        [
            f"data.prompts={trained}", f"eval.prompts={held_out}",
            f"eval.every={EVALUATED_EVERY}", f"eval.max_prompts={len(lines)}",
            f"eval.per_prompt={PER_PROMPT}",
            f"rollout.batch_size={EPISODES}", f"rollout.max_new_tokens={NEW_TOKENS}",
            f"ppo.epochs={EPOCHS}", f"ppo.minibatches={MINIBATCHES}", "kl.controller=fixed",
            f"kl.beta={BETA}", f"train.learning_rate={LEARNING_RATE}", "launch.threads=1",
            "launch.nice=0", *settings,
        ],
    )  # fmt: skip


def run_ours(side: str, seed: int, steps: int) -> Curve:
    """Trains with the engine."""
    with tempfile.TemporaryDirectory() as folder:
        run = load_ours(Path(folder), seed, steps, OURS[side])
        recorder = Recorder()
        for step in range(1, steps + 1):
            metrics, _ = train_step(run, step)
            run.state.step = step
            recorder.step(metrics)
            recorder.evaluate_if_due(run)
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

    def load(kind: Any, name: str, **more: Any) -> Any:
        return kind.from_pretrained(name, dtype=torch.float32, **more)

    with tempfile.TemporaryDirectory() as folder:
        evaluated = load_ours(Path(folder), seed, steps, [])
        lines = (Path(folder) / "prompts.jsonl").read_text().splitlines()
        rows = [{"input_ids": tokenizer(json.loads(x)["prompt"])["input_ids"]} for x in lines]
        recorders: list[Recorder] = []

        class Record(TrainerCallback):
            """Passes on what the trainer logs."""

            def on_train_begin(self, *_args: Any, **_named: Any) -> None:
                recorders.append(Recorder())

            def on_log(self, *_args: Any, **named: Any) -> None:
                logs = named["logs"]
                if "objective/scores" in logs:
                    recorders[0].step(logs)

            def on_step_end(self, *_args: Any, **_named: Any) -> None:
                copy_weights(trainer.policy_model, evaluated.policy.lm)
                recorders[0].evaluate_if_due(evaluated)

        settings = PPOConfig(
            output_dir=folder,
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
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=load(AutoModelForCausalLM, policy),
            ref_model=load(AutoModelForCausalLM, policy),
            reward_model=load(AutoModelForSequenceClassification, reward, num_labels=1),
            value_model=load(AutoModelForSequenceClassification, reward, num_labels=1),
            train_dataset=data,
            eval_dataset=data,
            callbacks=[Record()],
        )
        trainer.train()
    return recorders[0].curve("trl", seed)


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copies a model's parameters into another of the same names."""
    found = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(found.pop(name))
    if found:
        raise ValueError(f"the models differ in {', '.join(found)}")


def child(side: str, seed: int, steps: int, out: Path) -> None:
    """Trains one side with one seed, and appends its curve to `out`."""
    curve = run_trl(seed, steps) if side == "trl" else run_ours(side, seed, steps)
    with out.open("a") as file:
        file.write(json.dumps(asdict(curve)) + "\n")


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--out", type=Path, help="where curves are kept; default: nowhere")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after which what runs is dropped"
    )
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]), options.steps, options.out)
        return
    if "trl" in options.sides and not has_ppo_trainer():
        sys.exit(NO_TRL)
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "curves.jsonl"
        done = {(c.side, c.seed) for c in read(out, options.steps)}
        wanted = itertools.product(range(options.seeds), options.sides)
        missing = [(side, seed) for seed, side in wanted if (side, seed) not in done]
        with ThreadPoolExecutor(options.workers) as pool:
            ends = list(
                pool.map(lambda run: start(run[0], run[1], options.steps, out, deadline), missing)
            )
        curves = read(out, options.steps)
    print(machine.describe())
    print(
        f"\n{options.steps} steps of {EPISODES} episodes, beta {BETA}, learning rate "
        f"{LEARNING_RATE}, {EPOCHS} epochs of {MINIBATCHES} minibatches; mean ± standard error "
        "over seeds\n"
    )
    print_table(curves, options.sides, options.steps)
    if failed := [error for error in ends if error]:
        sys.exit("\n\n".join(failed))


def start(side: str, seed: int, steps: int, out: Path, deadline: float) -> str:
    """Runs a side in a process of its own, until `deadline` (of `time.monotonic`) at most.

    Returns:
        The end of what the process has printed if it failed, or an empty string.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        return ""
    began = time.monotonic()
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.learning_vs_trl"]
    command += ["--child", side, str(seed), "--steps", str(steps), "--out", str(out)]
    environment = os.environ | OFFLINE | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        with stopped(process):
            try:
                status = process.wait(left if left < math.inf else None)
            except subprocess.TimeoutExpired:
                print(f"{side}, seed {seed}: dropped", file=sys.stderr, flush=True)
                return ""
        print(
            f"{side}, seed {seed}: {time.monotonic() - began:.0f} s, exit status {status}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        log.seek(0)
        return f"{side}, seed {seed}:\n{log.read()[-3000:]}" if status else ""


@contextlib.contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Context at whose end a process runs no longer."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
