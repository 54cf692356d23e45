"""An ablation of the optimisations: does the policy learn the same with and without each?

    python -m benchmarks.learning [--steps 30] [--seeds 6] [--whole]

Runs a small version of the starter task with all optimisations and without some of them, with the
same seeds. An optimisation that only changes rounding must not change the result: the mean score
over seeds in the last quarter of the run must lie within the range of the seeds with all
optimisations. The other quarters are printed for information. Most ablations replace a function of
the engine by a plain implementation (:mod:`benchmarks.textbook`); the others change a setting.
Scores depend on the seed, the machine's kernels and its number of threads, but not on other load.
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

from transformers.utils.logging import disable_progress_bar

from benchmarks import machine, textbook
from engine import starter
from engine.config import file as config_file
from engine.config.sections.launch import LaunchConfig
from engine.launch.environment import rank_environment
from engine.protocol.rank_messages import Begin
from engine.session.folder import create
from engine.train.distributed.ranks import RankGroup
from engine.train.load import load_run
from engine.train.reward_scales import fit_scales
from engine.train.run import Run
from engine.train.step import train_step

SMALL = ["kl.controller=fixed", "rollout.batch_size=32", "rollout.max_new_tokens=24"]
QUARTERS = 4


@dataclass(frozen=True)
class Ablation:
    """One optimisation that is left out of a run."""

    name: str
    replacements: dict[str, Any] = field(default_factory=dict)
    """Functions to use instead of the engine's, by dotted name."""
    settings: tuple[str, ...] = ()


BY_LENGTH = Ablation(
    "micro-batches by length",
    {
        f"engine.train.{module}.longest_first": textbook.longest_first
        for module in ("ppo.optimise", "ppo.forward", "experience.model_outputs")
    },
)
ALWAYS = [
    Ablation(
        "products and gradients of our own",
        {
            "engine.train.models.pretrained.use_cpu_layers": textbook.no_op,
            "engine.train.rewards.kinds.model.use_cpu_layers": textbook.no_op,
        },
    ),
    Ablation(
        "log-probabilities without copies",
        {"engine.train.ppo.forward.token_logprobs": textbook.token_logprobs},
    ),
    BY_LENGTH,
    Ablation(
        "rows trimmed, response logits only",
        {
            "engine.train.ppo.optimise.rollout_forward": textbook.rollout_forward,
            "engine.train.ppo.forward.rollout_forward": textbook.rollout_forward,
        },
    ),
    Ablation(
        "cache, ended responses removed",
        {"engine.train.rollout.native.backend.generate": textbook.generate},
    ),
    Ablation(
        "log π of the rollout reused",
        {"engine.train.experience.model_outputs.old_policy_outputs": textbook.old_policy_outputs},
    ),
    Ablation(
        "frozen models file-backed",
        {"engine.train.distributed.sharding.back_by_file": textbook.no_op},
    ),
]
SHARED_VALUE = Ablation(
    "shared value head, tenfold rate",
    settings=("model.value=separate", "ppo.value_head_rate=1"),
)
"""The ablation is TRL's variant: a second model and one learning rate."""
FLOAT32 = Ablation("float32 (bfloat16 instead)", settings=("model.dtype=bfloat16",))
PROMPT_PER_GROUP = Ablation(
    "one prompt pass per group", {"engine.train.rollout.native.backend.generate": textbook.generate}
)
SEPARATE_PASSES = Ablation(
    "separate policy and value passes",
    {"engine.train.ppo.optimise.separate_passes": textbook.always_false},
)

TASKS: dict[str, tuple[list[str], list[list[Ablation]]]] = {
    "gae, shared value": (
        [],
        [ALWAYS, *([ablation] for ablation in ALWAYS), [SHARED_VALUE], [FLOAT32]],
    ),
    "gae, value head at the policy's rate": (["ppo.value_head_rate=1"], []),
    "gae, micro-batches of 8": (["ppo.micro_batch_size=8"], [[BY_LENGTH]]),
    "gae, separate value": (["model.value=separate"], [[SEPARATE_PASSES]]),
    "rloo, 4 responses per prompt": (["ppo.advantage=rloo"], [[PROMPT_PER_GROUP]]),
}
"""The settings of each task, and the ablations of each of its variants."""


def main() -> None:
    """Runs all variants and prints one row each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30, help="at least 4")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--whole", action="store_true", help="the starter task in full size")
    options = parser.parse_args()
    if options.steps < QUARTERS:
        parser.error(f"--steps must be at least {QUARTERS}: a column is a quarter of them")
    disable_progress_bar()  # it would stand within the table
    size = [] if options.whole else SMALL
    print(machine.describe())
    episodes = 64 if options.whole else 32
    print(
        f"\nmean score over seeds in each quarter of {options.steps} steps of {episodes} episodes\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        for task, (settings, variants) in TASKS.items():
            base_settings = size + settings
            base = curves(Path(folder), options.steps, options.seeds, base_settings, [])
            ends = [curve[-1] for curve in base]
            print(f"{task:<42}{format_curves(base)}", flush=True)
            for ablations in variants:
                extra = [setting for ablation in ablations for setting in ablation.settings]
                ablated = curves(
                    Path(folder), options.steps, options.seeds, base_settings + extra, ablations
                )
                end = statistics.mean(curve[-1] for curve in ablated)
                verdict = "within" if min(ends) <= end <= max(ends) else "OUTSIDE"
                if len(ablations) > 1:
                    name = "none of the following"
                else:
                    name = f"not: {ablations[0].name}"
                print(f"  {name:<40}{format_curves(ablated)}  {verdict}", flush=True)


def curves(
    folder: Path, steps: int, seeds: int, settings: list[str], ablations: list[Ablation]
) -> list[list[float]]:
    """The mean score in each quarter of a run, for each seed."""
    quarters = []
    for seed in range(seeds):
        scores = run_scores(folder, seed, steps, settings, ablations)
        cuts = [len(scores) * i // QUARTERS for i in range(QUARTERS + 1)]
        quarters.append([statistics.mean(scores[a:b]) for a, b in itertools.pairwise(cuts)])
    return quarters


def run_scores(
    folder: Path, seed: int, steps: int, settings: list[str], ablations: list[Ablation]
) -> list[float]:
    """The mean score of each step of one run."""
    with patched(ablations), tempfile.TemporaryDirectory(dir=folder) as sessions:
        run = run_metrics(Path(sessions), seed, steps, settings)
        return [metrics["objective/scores"] for metrics in run]


def run_metrics(
    sessions: Path, seed: int, steps: int, settings: list[str]
) -> Iterator[dict[str, float]]:
    """Loads a run of the starter task at once; yields the metrics of each step as it is done."""
    run = load_starter_run(sessions, seed, steps, settings)

    def train() -> Iterator[dict[str, float]]:
        for step in range(1, steps + 1):
            metrics, _ = train_step(run, step)
            run.state.step = step
            yield metrics

    return train()


def load_starter_run(sessions: Path, seed: int, steps: int, settings: list[str]) -> Run:
    """A run of the starter task in this process, in a session below `sessions`."""
    overrides = [f"seed={seed}", f"train.steps={steps}", *settings]
    config = config_file.load(starter.FOLDER / "demo.yaml", overrides)
    session = create(sessions, "run", config)
    begin = Begin(attempt=1, from_step=0)
    run = load_run(session, config, begin, RankGroup(config.launch))
    fit_scales(run, config)
    return run


@contextmanager
def patched(ablations: list[Ablation]) -> Iterator[None]:
    """Context in which the replacements of all ablations are in use."""
    with ExitStack() as stack:
        for ablation in ablations:
            for name, replacement in ablation.replacements.items():
                stack.enter_context(patch(name, replacement))
        yield


def format_curves(seeds: list[list[float]]) -> str:
    """Formats the mean over seeds of each quarter, and the last quarter of each seed."""
    means = (statistics.mean(values) for values in zip(*seeds, strict=True))
    ends = ", ".join(f"{curve[-1]:.3f}" for curve in seeds)
    return " ".join(f"{mean:7.3f}" for mean in means) + f"  ({ends})"


if __name__ == "__main__":
    if os.environ.get("OMP_WAIT_POLICY") != "PASSIVE":
        # Restart with the environment of a rank: threads that spin while they wait take several
        # times as long on a machine with other load.
        command = [sys.executable, "-m", "benchmarks.learning", *sys.argv[1:]]
        os.execve(sys.executable, command, rank_environment(LaunchConfig(nice=0)))
    main()
