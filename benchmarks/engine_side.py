"""Our engine as a side: a rank's own code, without a supervisor.

    python -m benchmarks.engine_side FOLDER [KEY=VALUE …]

FOLDER holds what :func:`benchmarks.task.write_models` wrote.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.side import Child
from benchmarks.task import Task
from engine import configfile
from engine.protocol import Begin
from engine.session import create
from engine.train.load import load_run
from engine.train.parallel import Team
from engine.train.rollout import Report
from engine.train.step import Run, train_step

YAML = """
model: {{policy: {folder}/policy}}
data: {{prompts: {folder}/prompts.jsonl}}
reward: {{model: {folder}/reward}}
train: {{save_every: 0, steps: 1000}}
log: {{tensorboard: false}}
"""


def settings(task: Task) -> list[str]:
    """The task in our configuration's keys."""
    return [
        f"rollout.batch_size={task.prompts}",
        f"rollout.max_new_tokens={task.new_tokens}",
        f"ppo.epochs={task.epochs}",
        f"ppo.minibatches={task.minibatches}",
        f"ppo.micro_batch_size={task.micro_batch}",
    ]


def load(folder: Path, sessions: Path, overrides: list[str]) -> Run:
    """A run of the models in `folder`."""
    file = sessions / "config.yaml"
    file.write_text(YAML.format(folder=folder.resolve()))
    config = configfile.load(file, overrides)
    session = create(sessions, "run", config)
    team = Team(config.launch)
    return load_run(session, config, Begin(attempt=1, from_step=0), team, _silent)


def _silent(_step: int, _name: str, *_progress: int) -> Report:
    return lambda _done, _total: None


def main() -> None:
    """Iterates as it is told."""
    child = Child()
    with tempfile.TemporaryDirectory() as sessions:
        run = load(Path(sys.argv[1]), Path(sessions), sys.argv[2:])
        child.ready()
        while True:
            with child.turn() as phases:
                metrics, _ = train_step(run, run.state.step + 1)
                run.state.step += 1
                phases |= {k: v for k, v in metrics.items() if k.startswith("time/")}


if __name__ == "__main__":
    main()
