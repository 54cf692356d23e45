"""The same learning: score against episodes with and without each optimisation.

    python -m benchmarks.learning [--steps 30] [--seeds 3] [--each]

The starter task in small, with all optimisations and without any, and with --each also without one
of them at a time; each with the same seeds. An optimisation that only rounds differently
must lie within the spread of the seeds without it: so must its mean score over the run's last
quarter. The variants are switched off from outside, by replacing the function that does it.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from engine import configfile, starter
from engine.config import LaunchConfig
from engine.launcher import environment
from engine.protocol import Begin
from engine.session import create
from engine.train import optimise, rollout, sharding
from engine.train.load import load_run
from engine.train.parallel import Team
from engine.train.step import train_step


def plain_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """As the textbook has it, with every copy."""
    whole = torch.log_softmax(logits.float() / temperature, -1)
    return whole.gather(2, tokens[:, :, None]).squeeze(2)


def in_order(made: Any, rows: Tensor, size: int) -> list[Tensor]:
    """Micro-batches as the rows come, whatever their lengths."""
    return list(rows.split(size)) if len(rows) else []


def nothing(*_args: Any, **_named: Any) -> None:
    """Instead of what is switched off."""


SMALL = ["kl.controller=fixed", "rollout.batch_size=32", "rollout.max_new_tokens=24"]

WITHOUT: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "oneDNN products": [
        ("engine.train.models", "speed_up", nothing),
        ("engine.train.reward_model", "speed_up", nothing),
    ],
    "log-probabilities without copies": [(rollout, "token_logprobs", plain_logprobs)],
    "micro-batches by length": [
        (optimise, "by_length", in_order),
        (rollout, "by_length", in_order),
    ],
    "frozen models in a file": [(sharding, "rest_in_file", nothing)],
}


@contextmanager
def switched_off(names: list[str]) -> Iterator[None]:
    """Without the optimisations of these names."""
    patches = [
        patch(f"{place if isinstance(place, str) else place.__name__}.{what}", instead)
        for name in names
        for place, what, instead in WITHOUT[name]
    ]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def scores(folder: Path, seed: int, steps: int, names: list[str]) -> list[float]:
    """Mean score of each step of one run."""
    overrides = [f"seed={seed}", f"train.steps={steps}", *SMALL]
    config = configfile.load(starter.FOLDER / "demo.yaml", overrides)
    with switched_off(names), tempfile.TemporaryDirectory(dir=folder) as place:
        session = create(Path(place), "run", config)
        begin = Begin(attempt=1, from_step=0)
        run = load_run(session, config, begin, Team(config.launch), _silent)
        found = []
        for step in range(1, steps + 1):
            metrics, _ = train_step(run, step)
            run.state.step = step
            found.append(metrics["objective/scores"])
    return found


def _silent(_step: int, _name: str, *_progress: int) -> Callable[[int, int], None]:
    return lambda _done, _total: None


def main() -> None:
    """Runs all variants and prints where they end."""
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--each", action="store_true", help="also one at a time")
    given = options.parse_args()
    last = max(1, given.steps // 4)
    print(f"mean score of the last {last} of {given.steps} steps, 32 episodes a step")
    with tempfile.TemporaryDirectory() as folder:
        ours = ends(Path(folder), given.steps, given.seeds, last, [])
        low, high = min(ours), max(ours)
        print(f"{'with all of them':<40}{show(ours)}")
        one_by_one = [[name] for name in WITHOUT] if given.each else []
        for names in [list(WITHOUT), *one_by_one]:
            title = f"without {names[0]}" if len(names) == 1 else "without any"
            without = ends(Path(folder), given.steps, given.seeds, last, names)
            mean = statistics.mean(without)
            word = "within" if low <= mean <= high else "OUTSIDE"
            print(f"{title:<40}{show(without)}  {word} the spread of seeds", flush=True)


def ends(folder: Path, steps: int, seeds: int, last: int, names: list[str]) -> list[float]:
    """The mean score of the last steps, by seed."""
    return [statistics.mean(scores(folder, seed, steps, names)[-last:]) for seed in range(seeds)]


def show(values: list[float]) -> str:
    """The mean and each seed's."""
    every = ", ".join(f"{v:.3f}" for v in values)
    return f"{statistics.mean(values):8.3f}  ({every})"


if __name__ == "__main__":
    if os.environ.get("OMP_WAIT_POLICY") != "PASSIVE":
        # As ranks are started: threads that spin while they wait take several times as long on a
        # machine that does anything else.
        words = [sys.executable, "-m", "benchmarks.learning", *sys.argv[1:]]
        os.execve(sys.executable, words, environment(LaunchConfig(nice=0)))
    main()
