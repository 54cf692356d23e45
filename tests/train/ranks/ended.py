"""Generates the responses of a step as one of several ranks: ``ended.py SESSION RESULT SETTINGS``.

The last are NAME=VALUE of the environment. Rank 0 writes the pairs of prompt and response that it
was told of while others were generated, and those of the rollout. The other ranks make a file with
the name of the result and `-waits` when they report that they wait.
"""

import json
import os
import sys
from pathlib import Path

from engine.config.sections.launch import LaunchConfig
from engine.progress import report_nothing
from engine.protocol.rank_messages import Begin
from engine.session.folder import SessionFolder
from engine.train.distributed import compute_on_rank_0
from engine.train.distributed.ranks import RankGroup
from engine.train.experience.generation import sampling_options
from engine.train.experience.respond import respond
from engine.train.load import load_run
from engine.train.rollout.vllm import remote_engines


def main():
    session, result = SessionFolder(Path(sys.argv[1])), Path(sys.argv[2])
    os.environ |= dict(word.split("=", 1) for word in sys.argv[3:])
    ranks = RankGroup(LaunchConfig(device="cpu"))
    run = load_run(session, session.config(), Begin(attempt=1, from_step=0), ranks)
    told, waits = [], Path(f"{result}-waits")
    compute_on_rank_0.WAITING_INTERVAL = 0.0
    remote_engines.BUDGET = 1  # a response in each message
    rollout = respond(
        run, run.policy, run.prompts.for_step(1), sampling_options(run, 1),
        report_nothing if ranks.is_lead else lambda _done, _total: waits.touch(),
        on_ended=(lambda prompt, text: told.append([prompt.text, text])) if ranks.is_lead else None,
    )  # fmt: skip
    if ranks.is_lead:
        all_of_them = [
            [prompt.text, text]
            for prompt, text in zip(rollout.batch.prompts, rollout.texts, strict=True)
        ]
        result.write_text(json.dumps({"told": told, "all": all_of_them}))
    ranks.final_barrier()
    os._exit(0)  # like a rank


if __name__ == "__main__":
    main()
