"""One step of recorded rollouts on the ranks torchrun started; rank 0 writes what came of each.

``steps.py JOBS``: a JSON list of jobs, each with a session's folder, the recorded rollout, and
where the metrics go; the updated weights go beside them.
"""

import json
import os
import pickle
import sys
from pathlib import Path

from safetensors.torch import save_file

from engine.config import LaunchConfig
from engine.protocol import STORE_VARIABLE, Begin
from engine.session import Session
from engine.train.load import load_run
from engine.train.parallel import Team
from engine.train.sharding import whole
from engine.train.step import train_step


def main():
    jobs = Path(sys.argv[1])
    os.environ[STORE_VARIABLE] = f"file:{jobs}.store"
    team = Team(LaunchConfig(device="cpu"))
    for job in json.loads(jobs.read_text()):
        one_step(team, Session(Path(job["session"])), Path(job["recorded"]), Path(job["result"]))
    team.part()
    os._exit(0)  # as a rank does


def one_step(team, session, recorded, result):
    def quiet(_step, _name, *_progress):
        return lambda _done, _total: None

    begin = Begin(attempt=1, from_step=0)
    run = load_run(session, session.config(), begin, team, quiet)
    rollout = pickle.loads(recorded.read_bytes())  # noqa: S301 - the test's own
    metrics, _ = train_step(run, 1, rollout)
    weights = {k: whole(p).detach().clone().contiguous() for k, p in run.policy.named_parameters()}
    if team.lead:
        save_file(weights, f"{result}.safetensors")
        result.write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
