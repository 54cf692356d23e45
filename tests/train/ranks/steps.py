"""Trains one step on recorded rollouts, as one of several ranks.

``steps.py JOBS``: JOBS is a JSON list of jobs, each with the folder of a session, a recorded
rollout and a result file. Rank 0 writes the metrics, and the answer to a probe before the step, to
the result file and the updated weights beside it.
"""

import json
import os
import pickle
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.config.sections.launch import LaunchConfig
from engine.protocol.rank_messages import Begin
from engine.session.folder import SessionFolder
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import full_tensor
from engine.train.evaluation.evaluate import evaluate_if_due
from engine.train.load import load_run
from engine.train.ppo import chunked_loss
from engine.train.reports.probe import answer_probe
from engine.train.reward_scales import fit_scales
from engine.train.step import train_step


def main():
    jobs = Path(sys.argv[1])
    ranks = RankGroup(LaunchConfig(device="cpu"))
    for job in json.loads(jobs.read_text()):
        chunked_loss.MAX_LOGITS = int(job["most_logits"])
        train_one_step(
            ranks, SessionFolder(Path(job["session"])), Path(job["recorded"]), Path(job["result"])
        )
    ranks.final_barrier()
    os._exit(0)  # like a rank


def train_one_step(ranks, session, recorded, result):
    begin = Begin(attempt=1, from_step=0)
    run = load_run(session, session.config(), begin, ranks)
    fit_scales(run, session.config())
    probe = answer_probe(run, run.prompts.for_step(1)[0].text)
    rollout = pickle.loads(recorded.read_bytes())  # noqa: S301 - written by the test
    metrics, _ = train_step(run, 1, rollout)
    weights = {
        k: full_tensor(p).detach().clone().contiguous() for k, p in run.policy.named_parameters()
    }
    if run.state.value_weights:
        weights["fitted value"] = torch.tensor(run.state.value_weights)
    if run.average is not None:
        average = run.average.tensors(run.policy).items()
        weights |= {f"ema/{k}": full_tensor(t).clone().contiguous() for k, t in average}
        metrics |= evaluate_if_due(run, 1).metrics
    if ranks.is_lead:
        save_file(weights, f"{result}.safetensors")
        result.write_text(json.dumps({"metrics": metrics, "probe": probe}))


if __name__ == "__main__":
    main()
