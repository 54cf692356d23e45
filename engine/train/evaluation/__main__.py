"""Evaluates a checkpoint: ``python -m engine.train.evaluation SESSION_FOLDER STEP``.

Reads the configuration as JSON on standard input. The last line of standard output is an
`EvaluationResult` or a `ProgramFailure`; each warning before it, such as that a service is asked
again, is a `ProgramNotice`. Reads the session and writes nothing to it.
"""

import logging
import sys
from pathlib import Path

import msgspec
from transformers.utils.logging import disable_progress_bar

from engine.config.schema import RunConfig
from engine.errors import RlhfError
from engine.examined import examined
from engine.protocol.programs.evaluation_result import EvaluationResult
from engine.protocol.programs.result import NoticeHandler, print_result
from engine.protocol.rank_messages import Begin
from engine.session.folder import SessionFolder
from engine.train.distributed.ranks import RankGroup
from engine.train.evaluation.evaluate import REWARD_FAILURES, evaluate
from engine.train.load import load_run


def main() -> None:
    """Evaluates one checkpoint and prints the result."""
    disable_progress_bar()
    logging.getLogger("engine").addHandler(NoticeHandler(logging.WARNING))
    folder, step = Path(sys.argv[1]), int(sys.argv[2])
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=examined(RunConfig))
    print_result(lambda: _evaluated(SessionFolder(folder), config, step))


def _evaluated(session: SessionFolder, config: RunConfig, step: int) -> EvaluationResult:
    # No supervisor keeps rollout engines of their own here.
    config = msgspec.structs.replace(config, rollout=config.rollout.in_process())
    ranks = RankGroup(config.launch)
    run = load_run(session, config, Begin(attempt=1, from_step=step), ranks)
    if run.held_out is None:
        raise TypeError("the configuration has no evaluation; the caller must check that")
    try:
        evaluation = evaluate(run, run.held_out, step)
    except REWARD_FAILURES as error:
        raise RlhfError(
            f"{error}; nothing can be evaluated without it: evaluate again once it works"
        ) from error
    return EvaluationResult(
        dict(evaluation.metrics),
        msgspec.to_builtins(evaluation.samples),
        {name: str(error) for name, error in evaluation.failed.items()},
    )


if __name__ == "__main__":
    main()
