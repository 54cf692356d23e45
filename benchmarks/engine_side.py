"""The engine as a side of a comparison: the code of a rank, without a supervisor.

    python -m benchmarks.engine_side FOLDER [KEY=VALUE …]

FOLDER is one that :func:`benchmarks.task.write_models` has written.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.side import Child
from benchmarks.task import Task
from engine.config import file as config_file
from engine.protocol.rank_messages import Begin
from engine.session.folder import create
from engine.train.distributed.ranks import RankGroup
from engine.train.load import load_run
from engine.train.run import Run
from engine.train.step import train_step

YAML = """
model: {{policy: {folder}/policy}}
data: {{prompts: {folder}/prompts.jsonl}}
reward: {{model: {folder}/reward}}
train: {{save_every: 0, steps: 1000}}
log: {{tensorboard: false}}
"""


def settings(task: Task) -> list[str]:
    """The overrides that configure the engine for a task."""
    return [
        f"rollout.batch_size={task.prompts}",
        f"rollout.max_new_tokens={task.new_tokens}",
        f"ppo.epochs={task.epochs}",
        f"ppo.minibatches={task.minibatches}",
        f"ppo.micro_batch_size={task.micro_batch}",
    ]


def load(folder: Path, sessions: Path, overrides: list[str]) -> Run:
    """Loads a run with the models in `folder` and a new session in `sessions`."""
    file = sessions / "config.yaml"
    file.write_text(YAML.format(folder=folder.resolve()))
    config = config_file.load(file, overrides)
    session = create(sessions, "run", config)
    ranks = RankGroup(config.launch)
    return load_run(session, config, Begin(attempt=1, from_step=0), ranks)


def main() -> None:
    """Loads the run and does one step per request of the parent."""
    child = Child()
    with tempfile.TemporaryDirectory() as sessions:
        run = load(Path(sys.argv[1]), Path(sessions), sys.argv[2:])
        child.ready()
        while True:
            with child.iteration() as phases:
                metrics, _ = train_step(run, run.state.step + 1)
                run.state.step += 1
                phases |= {k: v for k, v in metrics.items() if k.startswith("time/")}


if __name__ == "__main__":
    main()
