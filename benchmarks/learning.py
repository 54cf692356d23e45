"""The same learning: score against episodes with and without each optimisation.

    python -m benchmarks.learning [--steps 30] [--seeds 6] [--whole]

The starter task in small, with everything on and with an optimisation undone, each with the same
seeds. An optimisation that only rounds differently must lie within the spread of the seeds: so must
the mean over seeds, in the last quarter of the run; the quarters before are shown. Most
are undone by putting a textbook's way of doing it in the place of ours
(:mod:`benchmarks.textbook`), the others by a setting. Scores depend on the seed, the machine's
kernels and its number of threads, not on what else runs.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import machine, textbook
from engine import starter
from engine.config import file as config_file
from engine.config.schema import LaunchConfig
from engine.launch.environment import rank_environment
from engine.protocol.rank_messages import Begin
from engine.session.folder import create
from engine.train.distributed.ranks import RankGroup
from engine.train.load import load_run
from engine.train.step import train_step

SMALL = ["kl.controller=fixed", "rollout.batch_size=32", "rollout.max_new_tokens=24"]
QUARTERS = 4


@dataclass(frozen=True)
class Undone:
    """One optimisation that is left out."""

    name: str
    instead: dict[str, Any] = field(default_factory=dict)
    """What stands where, by dotted name."""
    settings: tuple[str, ...] = ()


BY_LENGTH = Undone(
    "micro-batches by length",
    {
        f"engine.train.{place}.longest_first": textbook.longest_first
        for place in ("ppo.optimise", "ppo.forward", "step")
    },
)
ALWAYS = [
    Undone(
        "products by oneDNN",
        {
            "engine.train.models.language_model.use_onednn": textbook.nothing,
            "engine.train.rewards.model.use_onednn": textbook.nothing,
        },
    ),
    Undone(
        "log-probabilities without copies",
        {"engine.train.ppo.forward.token_logprobs": textbook.token_logprobs},
    ),
    BY_LENGTH,
    Undone(
        "rows trimmed, logits of answers only",
        {
            "engine.train.ppo.optimise.rollout_forward": textbook.rollout_forward,
            "engine.train.ppo.forward.rollout_forward": textbook.rollout_forward,
        },
    ),
    Undone(
        "cache, ended answers leave", {"engine.train.rollout.native.generate": textbook.generate}
    ),
    Undone(
        "the rollout's log π used again",
        {"engine.train.step.old_policy_outputs": textbook.old_policy_outputs},
    ),
    Undone(
        "frozen models in a file",
        {"engine.train.distributed.sharding.back_by_file": textbook.nothing},
    ),
]
ON_THE_TRUNK = Undone(
    "value head on the trunk, its rate",
    settings=("model.value=separate", "ppo.value_head_rate=1"),
)
"""Without them it is what TRL does: a second model, and one learning rate."""
FLOAT32 = Undone("… and bfloat16 instead of float32", settings=("model.dtype=bfloat16",))
GROUPS_ONCE = Undone(
    "a group's prompt read once", {"engine.train.rollout.native.generate": textbook.generate}
)
ONE_BY_ONE = Undone(
    "policy and value one by one", {"engine.train.ppo.optimise.separate_passes": textbook.no}
)

TASKS: dict[str, tuple[list[str], list[list[Undone]]]] = {
    "gae, shared value": ([], [ALWAYS, *([one] for one in ALWAYS), [ON_THE_TRUNK], [FLOAT32]]),
    "gae, the head at the policy's rate": (["ppo.value_head_rate=1"], []),
    "gae, micro-batches of 8": (["ppo.micro_batch_size=8"], [[BY_LENGTH]]),
    "gae, separate value": (["model.value=separate"], [[ONE_BY_ONE]]),
    "rloo, 4 answers a prompt": (["ppo.advantage=rloo"], [[GROUPS_ONCE]]),
}
"""Settings of each task, and what is undone in its runs."""


def main() -> None:
    """Runs every variant and prints its curve."""
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--seeds", type=int, default=6)
    options.add_argument("--whole", action="store_true", help="The starter task as it comes.")
    given = options.parse_args()
    size = [] if given.whole else SMALL
    print(machine.describe())
    episodes = 64 if given.whole else 32
    print(
        f"\nmean score in each quarter of {given.steps} steps of {episodes} episodes, over seeds\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        for task, (settings, variants) in TASKS.items():
            kept = size + settings
            everything = curves(Path(folder), given.steps, given.seeds, kept, [])
            ends = [curve[-1] for curve in everything]
            print(f"{task:<42}{show(everything)}", flush=True)
            for undone in variants:
                extra = [setting for one in undone for setting in one.settings]
                without = curves(Path(folder), given.steps, given.seeds, kept + extra, undone)
                end = statistics.mean(curve[-1] for curve in without)
                word = "within" if min(ends) <= end <= max(ends) else "OUTSIDE"
                name = "none of the following" if len(undone) > 1 else f"not: {undone[0].name}"
                print(f"  {name:<40}{show(without)}  {word}", flush=True)


def curves(
    folder: Path, steps: int, seeds: int, settings: list[str], undone: list[Undone]
) -> list[list[float]]:
    """By seed, the mean score in each quarter of a run."""
    found = []
    for seed in range(seeds):
        scores = run_scores(folder, seed, steps, settings, undone)
        cuts = [len(scores) * i // QUARTERS for i in range(QUARTERS + 1)]
        found.append([statistics.mean(scores[a:b]) for a, b in itertools.pairwise(cuts)])
    return found


def run_scores(
    folder: Path, seed: int, steps: int, settings: list[str], undone: list[Undone]
) -> list[float]:
    """Mean score of each step of one run."""
    overrides = [f"seed={seed}", f"train.steps={steps}", *settings]
    config = config_file.load(starter.FOLDER / "demo.yaml", overrides)
    with replaced(undone), tempfile.TemporaryDirectory(dir=folder) as place:
        session = create(Path(place), "run", config)
        begin = Begin(attempt=1, from_step=0)
        run = load_run(session, config, begin, RankGroup(config.launch), _silent)
        found = []
        for step in range(1, steps + 1):
            metrics, _ = train_step(run, step)
            run.state.step = step
            found.append(metrics["objective/scores"])
    return found


@contextmanager
def replaced(undone: list[Undone]) -> Iterator[None]:
    """With the textbook's pieces in the place of ours."""
    with ExitStack() as stack:
        for one in undone:
            for place, instead in one.instead.items():
                stack.enter_context(patch(place, instead))
        yield


def show(found: list[list[float]]) -> str:
    """The mean curve, and where each seed ended."""
    means = (statistics.mean(values) for values in zip(*found, strict=True))
    every = ", ".join(f"{curve[-1]:.3f}" for curve in found)
    return " ".join(f"{mean:7.3f}" for mean in means) + f"  ({every})"


def _silent(_step: int, _name: str, *_progress: int) -> Any:
    return lambda _done, _total: None


if __name__ == "__main__":
    if os.environ.get("OMP_WAIT_POLICY") != "PASSIVE":
        # As ranks are started: threads that spin while they wait take several times as long on a
        # machine that does anything else.
        words = [sys.executable, "-m", "benchmarks.learning", *sys.argv[1:]]
        os.execve(sys.executable, words, rank_environment(LaunchConfig(nice=0)))
    main()
