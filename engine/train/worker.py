"""The main program of a rank: ``python -m engine.train.worker SESSION_FOLDER``.

A supervisor starts it through :mod:`engine.launch.rank`, sends it commands and receives its
reports. A rank never outlives its supervisor.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from transformers.utils.logging import disable_progress_bar

from engine.config.schema import RunConfig
from engine.config.sections.launch import LaunchConfig
from engine.config.settings import SettingChange
from engine.errors import LinkError
from engine.examined import examined
from engine.launch.environment import LAUNCH_VARIABLE
from engine.log_lines import log_to
from engine.protocol.rank_messages import (
    RESTART_REASONS,
    Begin,
    EvaluationReport,
    Notice,
    Ready,
    Sample,
    StepReport,
)
from engine.session.folder import SessionFolder
from engine.train.boundary import Boundary, update_reference
from engine.train.distributed.ranks import RankGroup
from engine.train.evaluation.evaluate import Evaluation, recorded
from engine.train.evaluation.scheduled import (
    evaluate_or_skip,
    incomplete_evaluation,
    make_up,
    measure_before_training,
)
from engine.train.failure import failed_message
from engine.train.link import Link, SupervisorEndedError
from engine.train.load import load_run
from engine.train.models import memory_check
from engine.train.models.language_model import parameter_count
from engine.train.out_of_memory import run_step
from engine.train.reports.recorders import open_recorders
from engine.train.reports.setup_notes import dtype_note, setup_notes
from engine.train.reports.trusted_code import trusted_code
from engine.train.rewards.kinds.http_client import REQUEST_THREADS
from engine.train.rewards.source import RewardCallError
from engine.train.run import Run

log = logging.getLogger("engine")

RESTART_EXIT = 3
"""Exit code of a rank when the run is not over, so that other machines do not stop as well."""


def main() -> None:
    """Trains to the end of the run. Reports any error to the supervisor before it exits."""
    log_to(sys.stdout)
    for name in ("httpx", "httpx2", "datasets", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Progress bars would fill engine.log with carriage returns.
    disable_progress_bar()
    session = SessionFolder(Path(sys.argv[1]))
    # RankGroup determines the final rank below. Only ranks on the supervisor's machine have a link,
    # and they are numbered first, so their rank is LOCAL_RANK. torchrun's RANK may differ: it may
    # order the machines differently.
    link = Link(int(os.environ.get("LOCAL_RANK", "0")))
    ranks: RankGroup | None = None
    try:
        ranks = RankGroup(
            msgspec.json.decode(os.environ[LAUNCH_VARIABLE], type=examined(LaunchConfig))
        )
        link.rank = ranks.rank
        if not ranks.is_lead:  # rank 0 logs for all
            logging.getLogger().setLevel(logging.WARNING)
        reason = train(session, link, ranks)
    except SupervisorEndedError as error:  # there is nobody to report to, and nothing is wrong here
        log.error("rank %d ends: %s", link.rank, error)  # noqa: TRY400 - one line
        exit_now(1)
    except LinkError:
        raise
    except Exception as error:
        link.send(failed_message(error, ranks, link.rank))
        traceback.print_exc()
        exit_now(getattr(error, "exit_code", 1))
    if ranks.size > 1:
        ranks.final_barrier()
        exit_now(RESTART_EXIT if reason in RESTART_REASONS else 0)
    if left := threads_left():
        if others := [name for name in left if not name.startswith(REQUEST_THREADS)]:
            log.warning("the run has ended; not waiting for %s", ", ".join(others))
        exit_now(0)


def threads_left() -> list[str]:
    """The names of threads that may keep the process alive: of requests, or of a user's code."""
    others = (t for t in threading.enumerate() if t is not threading.main_thread())
    return [thread.name for thread in others if not thread.daemon]


def exit_now(code: int) -> NoReturn:
    """Exits without finalising the interpreter.

    Process-group threads may be waiting for other ranks that in turn wait for this one. Also, the
    interpreter sometimes aborts while destroying the groups, which looks like a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(session: SessionFolder, link: Link, ranks: RankGroup) -> str:
    """Runs the training loop: commands, step, report, save. Returns the reason of the end."""
    begin, config = receive_start(session, link, ranks)

    def notify(rule: str, text: str) -> None:
        link.send(Notice(step=begin.from_step, rule=rule, text=text))

    def warn(rule: str, step: int, text: str) -> None:
        log.warning(text)
        link.send(Notice(step=step, rule=rule, text=text))

    if ranks.device_note:
        notify("device", ranks.device_note)
    for text in trusted_code(config):
        warn("trust_remote_code", begin.from_step, text)
    run = load_run(session, config, begin, ranks, link.phase, notify)
    if text := dtype_note(ranks.device, config.model.dtype, parameter_count(run.policy)):
        warn("dtype", begin.from_step, text)
    boundary = Boundary(session, run, begin, link)
    notes = setup_notes(config, run) if begin.attempt == 1 else []
    for text in notes:
        log.warning(text)
    info = run_info(run) | ({"notes": notes} if notes else {})
    link.send(Ready(info=info, settings=boundary.next_settings()))
    recorders = open_recorders(session, config, begin.from_step, warn) if ranks.is_lead else []

    with contextlib.closing(boundary):
        baseline = measure_before_training(boundary, run, config)
        if baseline.metrics:
            link.send(EvaluationReport(baseline.metrics, recorded(baseline.samples)))
            for recorder in recorders:
                recorder.step(0, baseline.metrics, baseline.samples)
        missing = incomplete_evaluation(run, begin)
        while boundary.before_step():
            if missing is not None:
                make_up(boundary, run, link, recorders, missing)
                missing = None
                continue
            update_reference(run)
            step = run.state.step + 1
            started = time.monotonic()
            try:
                metrics, samples = run_step(run, step, boundary.adjust)
            except RewardCallError as error:
                boundary.pause_before_step(error)
                continue
            evaluation, problem = evaluate_or_skip(run, step)
            metrics |= evaluation.metrics
            changes = boundary.after_step(step, metrics, time.monotonic() - started)
            for recorder in recorders:
                recorder.step(step, metrics, samples)
            settings = boundary.next_settings()
            link.send(step_report(run, step, metrics, samples, settings, changes, evaluation))
            boundary.checkpoints.save_if_due()
            if problem is not None:
                boundary.pause_before_step(problem)
                missing = evaluation
        reason = boundary.finish()
    for recorder in recorders:
        recorder.close()
    return reason


def step_report(
    run: Run,
    step: int,
    metrics: dict[str, float],
    samples: list[Sample],
    settings: dict[str, Any],
    changes: list[SettingChange],
    evaluation: Evaluation,
) -> StepReport:
    """Builds the report of a finished step.

    Args:
        run: its state after the step.
        step: its number.
        metrics: the step's metrics.
        samples: its responses.
        settings: the next step's settings.
        changes: changes made by the KL controller.
        evaluation: the evaluation after the step.
    """
    update_step = run.state.reference_updated
    return StepReport(
        step=step,
        metrics=metrics,
        samples=recorded(samples),
        settings=settings,
        changes=changes,
        ranks=run.times.ranks,
        reference_mix=run.config.kl.reference_update.mix if 0 < update_step == step - 1 else None,
        evaluated=recorded(evaluation.samples),
    )


def receive_start(session: SessionFolder, link: Link, ranks: RankGroup) -> tuple[Begin, RunConfig]:
    """Receives `Begin` on rank 0 and reads the configuration; returns both on every rank."""
    return ranks.broadcast(
        lambda: (link.wait_for_begin(), session.config()), tuple[Begin, RunConfig]
    )


def run_info(run: Run) -> dict[str, object]:
    """Collects facts about a loaded run for the event `ready`."""
    return {
        "policy_parameters": parameter_count(run.policy),
        "trained_parameters": sum(p.numel() for p in run.policy.parameters() if p.requires_grad),
        "reference_parameters": parameter_count(run.reference),
        "prompts": len(run.prompts),
        "prompts_left_out": run.prompts.left_out,
        "device": str(run.device),
        "ranks": run.ranks.size,
        "strategy": run.strategy,
        "threads": run.state.threads,
        "torch": str(torch.__version__),
        **memory_check.facts(run.memory),
    }


if __name__ == "__main__":
    main()
