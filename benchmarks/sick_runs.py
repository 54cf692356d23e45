"""Makes the runs that the detectors are measured with: healthy ones, and sick ones on purpose.

    python -m benchmarks.sick_runs OUT [--workers N] [--seconds S] [--seeds 20] [--steps 120]

Each run is one of the starter, in a process of the pool and without a supervisor: 16 responses of
at most 24 tokens a step, an evaluation after every tenth step, and a source of weight 0 that only
watches. A run that is done becomes one line of OUT/runs.jsonl, with all metrics of each step but
times. Runs that are there already are not made again. They are made seed by seed, so that after S
seconds, when it ends, each kind has about as many. :mod:`benchmarks.detectors` evaluates them.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from engine import starter
from engine.config import file as config_file
from engine.config.settings import change_settings, settings_of
from engine.kl import next_beta
from engine.metrics import KL
from engine.monitoring.divergence import judges_of
from engine.protocol.rank_messages import Begin
from engine.session.folder import create
from engine.train.distributed.ranks import RankGroup
from engine.train.evaluation.evaluate import evaluate_if_due
from engine.train.load import load_run
from engine.train.reward_scales import fit_scales
from engine.train.run import Run
from engine.train.step import train_step

COMMON = [
    "rollout.batch_size=16", "rollout.max_new_tokens=24", "ppo.micro_batch_size=16",
    "eval.every=10", "eval.holdout=32", "log.samples=4", "log.arrays=0", "log.tensorboard=false",
    "launch.device=cpu", "launch.threads=1", "train.save_every=0",
]  # fmt: skip
NO_KL = ["kl.controller=fixed", "kl.beta=0"]
HONEST = [
    {"model": "starter:reward", "weight": 1.0, "name": "honest"},
    {"function": "benchmarks.sick_rewards:lexicon", "weight": 0.0, "name": "watched"},
]
"""The starter's reward is trained on; the lexicon watches."""
BROKEN_EOS = "BROKEN_EOS"
"""Stands for a copy of the policy whose end-of-sequence token is one that it never writes."""
LEFT_OUT = ("time/", "perf/", "episode", "lr")
"""Metrics that no guard rail reads begin so."""


def pays_for(function: str) -> list[dict[str, Any]]:
    """A reward of :mod:`benchmarks.sick_rewards`, which the starter's own watches."""
    return [
        {"function": f"benchmarks.sick_rewards:{function}", "weight": 1.0, "name": function},
        {"model": "starter:reward", "weight": 0.0, "name": "honest"},
    ]


@dataclass(frozen=True)
class Kind:
    """A kind of run."""

    overrides: list[str]
    mix: list[dict[str, Any]]
    """The reward."""


GROUPS = ["ppo.advantage=rloo", "rollout.per_prompt=4"]
KINDS = {
    "healthy": Kind([], HONEST),
    "healthy-rloo": Kind(GROUPS, HONEST),
    "beta-0": Kind(NO_KL, HONEST),
    "loophole": Kind(NO_KL, pays_for("great")),
    "length-hack": Kind([], pays_for("length")),
    "template": Kind(NO_KL, pays_for("phrase")),
    "lr-30": Kind(["train.learning_rate=3.0e-3"], HONEST),
    "entropy-collapse": Kind([*NO_KL, "train.learning_rate=3.0e-4", "ppo.epochs=4"], HONEST),
    "unending": Kind([], pays_for("unending")),
    "broken-eos": Kind([f"model.policy={BROKEN_EOS}"], HONEST),
    "frozen-value": Kind(["ppo.value_coef=0", "ppo.value_head_rate=1.0e-6"], HONEST),
    "dead-groups": Kind(GROUPS, pays_for("praises")),
}
"""By name. Those that begin with `healthy` are healthy; the others are sick from step 1 on."""


@dataclass(frozen=True)
class Job:
    """A run to be made."""

    kind: str
    seed: int
    steps: int
    folder: Path
    """A temporary one."""
    deadline: float
    """When the run is given up, on the monotonic clock, which all processes share."""


class _OutOfTimeError(Exception):
    """The deadline is over."""


def make(job: Job) -> dict[str, Any] | None:
    """Makes a run in this process; None if its time is over before it is done.

    Returns:
        What is written of it. An error that ends the run early is part of it: runs that are sick
        enough have one.
    """
    if time.monotonic() > job.deadline:
        return None
    kind, started = KINDS[job.kind], time.process_time()
    row: dict[str, Any] = {"kind": job.kind, "seed": job.seed, "steps": 0, "error": None}
    steps: list[dict[str, float]] = []
    try:
        for metrics in _steps(job, kind, row):
            steps.append(metrics)  # noqa: PERF402 - those before an error are kept
    except _OutOfTimeError:
        return None
    except Exception as error:  # the boundary of the process: the line of the run has it
        row["error"] = f"{type(error).__name__}: {error}"
    names = sorted({name for metrics in steps for name in metrics})
    row["steps"] = len(steps)
    row["seconds"] = round(time.process_time() - started, 1)
    row["metrics"] = {name: [_short(m.get(name)) for m in steps] for name in names}
    return row


def _short(value: float | None) -> float | None:
    """Five digits, which is more than a guard rail needs."""
    return value if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _steps(job: Job, kind: Kind, row: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Trains, and yields each step's metrics; `row` gets what is known of the whole run."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=job.folder) as sessions:
        run = _load(job, kind, Path(sessions))
        settings = settings_of(run.config)
        row["settings"] = {
            "target": settings.target, "max_new_tokens": settings.max_new_tokens,
            "beta": settings.beta,
        }  # fmt: skip
        row["judges"] = sorted(judges_of(run.config))
        row["before"] = _kept(evaluate_if_due(run, 0).metrics)
        for step in range(1, job.steps + 1):
            if time.monotonic() > job.deadline:
                raise _OutOfTimeError
            metrics, samples = train_step(run, step)
            run.state.step = step
            metrics |= evaluate_if_due(run, step).metrics
            kl = run.config.kl
            beta = next_beta(kl, metrics[KL], run.config.rollout.batch_size)
            if beta != kl.beta:
                run.config = change_settings(run.config, {"beta": beta})
            row["samples"] = [s.prompt + s.response for s in samples]  # of the last step
            yield _kept(metrics)


def _kept(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(LEFT_OUT)}


def _load(job: Job, kind: Kind, sessions: Path) -> Run:
    overrides = [
        *COMMON, f"train.steps={job.steps}", f"seed={job.seed}", "reward.model=null",
        f"reward.mix={json.dumps(kind.mix)}",
        *(o.replace(BROKEN_EOS, str(job.folder / BROKEN_EOS)) for o in kind.overrides),
    ]  # fmt: skip
    config = config_file.load(starter.FOLDER / "demo.yaml", overrides)
    session = create(sessions, "run", config)
    ranks = RankGroup(config.launch)
    run = load_run(session, config, Begin(attempt=1, from_step=0), ranks)
    fit_scales(run, config)
    return run


def break_eos(folder: Path) -> None:
    """Copies the starter's policy, with the beginning of a sequence for its end."""
    shutil.copytree(starter.FOLDER / "policy", folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        content = json.loads(path.read_text())
        if name == "tokenizer_config.json":
            content["eos_token"] = content["bos_token"]
        else:
            content["eos_token_id"] = content["bos_token_id"]
        path.write_text(json.dumps(content))


def made(file: Path) -> set[tuple[str, int]]:
    """Kind and seed of the runs in a file. One that failed before its first step does not count."""
    if not file.exists():
        return set()
    found = set()
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a process that was killed
            continue
        if row["steps"]:
            found.add((row["kind"], row["seed"]))
    return found


def main() -> int:
    """Makes the runs that are missing, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of runs.jsonl")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which it ends")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=120, help="steps of a run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which")
    given = parser.parse_args()
    began = time.monotonic()
    os.environ |= {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "runs.jsonl"
    done = made(file)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool,
        file.open("a") as lines,
    ):
        break_eos(Path(folder) / BROKEN_EOS)
        if file.stat().st_size and not file.read_bytes().endswith(b"\n"):
            lines.write("\n")
        jobs = [
            Job(kind, seed, given.steps, Path(folder), began + given.seconds)
            for seed in range(given.seeds)
            for kind in given.kinds
            if (kind, seed) not in done
        ]
        for future in as_completed([pool.submit(make, job) for job in jobs]):
            row = future.result()
            if row is None:
                continue
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            end = f"   {row['error']}" if row["error"] else ""
            about = f"{row['kind']:<18}seed {row['seed']:>2}  {row['steps']:>4} steps"
            print(f"{about} {row['seconds']:>6.1f} CPU s{end}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
