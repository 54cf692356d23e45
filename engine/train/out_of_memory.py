"""Handles a step that runs out of memory: describes the error and retries with less memory."""

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import torch

from engine.config.schema import RunConfig
from engine.config.settings import SettingChange
from engine.errors import RlhfError, error_text
from engine.protocol.rank_messages import Sample
from engine.train.run import Run
from engine.train.step import train_step

log = logging.getLogger("engine")

LESS_MEMORY = (
    "Less is needed with a smaller ppo.micro_batch_size, reward.batch_size or rollout.at_once, or "
    "with parallel.activation_checkpointing, model.dtype: bfloat16 or lora.rank (rlhf-tui plan)"
)
OUT_OF_MEMORY_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
    "Cuda failure 2 'out of memory'",
)
"""Substrings of out-of-memory messages from torch's allocators, CUDA's libraries and NCCL."""


class StepOutOfMemoryError(RlhfError):
    """A step ran out of memory on this rank."""

    def __init__(self, text: str, step: int, change: SettingChange | None) -> None:
        """Stores the arguments.

        Args:
            text: what happened.
            step: the step.
            change: the setting to retry with; None if no setting is known to help.
        """
        super().__init__(text)
        self.step = step
        self.change = change


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate memory, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        any(part in text for part in OUT_OF_MEMORY_TEXTS)
        or ("NCCL" in text and "out of memory" in text)
    )


def memory_text(error: BaseException) -> str:
    """Returns the first two sentences of torch's message, without its statistics."""
    first = error_text(error).strip().split("\n")[0]
    return ". ".join(first.split(". ")[:2]).rstrip(".")


def run_step(
    run: Run, step: int, adjust: Callable[[SettingChange, str], None]
) -> tuple[dict[str, float], list[Sample]]:
    """Runs a step; if it runs out of memory, retries it with half the micro-batch.

    The step starts over. Its random choices depend only on its number, so the results equal those
    of a run that uses the smaller micro-batch from this step on. The retry needs the weights from
    the beginning of the step, so it only happens here on a single rank that has not updated them
    yet. Otherwise the supervisor restarts the ranks from the last checkpoint, with half the
    micro-batch from this step on.

    Args:
        run: the run.
        step: counted from 1.
        adjust: changes and records a setting; called with a sentence for the operator.

    Raises:
        StepOutOfMemoryError: the step cannot be repeated here.
    """
    while True:
        problem = attempt_step(run, step)
        if not isinstance(problem, StepOutOfMemoryError):
            return problem
        # The error's stack frames held the tensors of the step.
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        if problem.change is not None:
            text = f"{problem}; the step is repeated with {change_text(problem.change)}"
            adjust(problem.change, text)


def attempt_step(
    run: Run, step: int
) -> tuple[dict[str, float], list[Sample]] | StepOutOfMemoryError:
    """Runs a step; if it runs out of memory but can be retried here, returns the error.

    Raises:
        StepOutOfMemoryError: the step cannot be retried here.
    """
    state, updates = copy.copy(run.state), list[int]()

    def count(*_hook_arguments: Any) -> None:
        updates.append(step)

    # A pre-hook: an update that runs out of memory midway has already changed some weights.
    hook = run.optimiser.register_step_pre_hook(count)
    try:
        return train_step(run, step)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        problem = describe(error, run, step)
        if problem.change is None or updates or run.ranks.size > 1:
            raise problem from error
    finally:
        hook.remove()
    run.state = state
    run.optimiser.zero_grad(set_to_none=True)
    run.learner.eval()
    return problem


def describe(error: BaseException, run: Run, step: int) -> StepOutOfMemoryError:
    """Builds the error of a step that ran out of memory, with a remedy."""
    phase = run.times.current
    size = smaller_micro_batch(run.config, run.ranks.size, phase)
    text = f"step {step} ran out of memory in the phase '{phase}': {memory_text(error)}"
    if size is None:
        return StepOutOfMemoryError(f"{text}. {LESS_MEMORY}", step, None)
    change = SettingChange(key="micro_batch_size", old=run.config.ppo.micro_batch_size, new=size)
    return StepOutOfMemoryError(text, step, change)


def smaller_micro_batch(config: RunConfig, ranks: int, phase: str) -> int | None:
    """Halves the largest micro-batch of a phase; None if the phase has none or it is one row."""
    rows = -(-config.rollout.batch_size // ranks)
    if phase == "optimise":
        rows = -(-config.rollout.batch_size // config.ppo.minibatches // ranks)
    elif phase != "reference":
        return None
    return min(config.ppo.micro_batch_size, rows) // 2 or None


def change_text(change: SettingChange) -> str:
    """Formats a change, for example `ppo.micro_batch_size 8 instead of 16`."""
    return f"ppo.{change.key} {change.new} instead of {change.old}"
