"""Trains a reward model: ``python -m engine.train.reward_training``.

Reads a :class:`~engine.protocol.programs.reward_training.RewardTrainingRequest` as JSON on standard
input. Each line of standard output is a `TrainingProgress` of that module; the last one is a
`TrainedReward`, or an object with `error`. On SIGTERM it removes everything it has written and
exits.
"""

import os
import signal
import sys
from types import FrameType

import msgspec
from transformers.utils.logging import disable_progress_bar

from engine.errors import RlhfError
from engine.examined import examined
from engine.protocol.programs.result import ProgramFailure
from engine.protocol.programs.reward_training import RewardTrainingRequest, TrainingProgress
from engine.train.out_of_memory import is_out_of_memory, memory_text
from engine.train.reward_training.train import train_reward

LESS_MEMORY = (
    "Less is needed with a smaller --base, --set batch_size or --set max_tokens. All weights are "
    "trained in float32: 16 bytes a parameter"
)


class _InterruptedError(BaseException):
    """SIGTERM has arrived. Not an Exception, so that no handler treats it as a failure."""


def main() -> None:
    """Trains and prints the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to the command line, too
    signal.signal(signal.SIGTERM, _interrupt)
    disable_progress_bar()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=examined(RewardTrainingRequest))
    try:
        result: object = train_reward(request, lambda text: _print(TrainingProgress(text)))
    except _InterruptedError:  # by now everything that was written is removed
        os._exit(128 + signal.SIGTERM)  # torch's threads may keep the interpreter from ending
    except RlhfError as error:
        result = ProgramFailure.of(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = f"out of memory: {memory_text(error)}. {LESS_MEMORY}"
        result = ProgramFailure(text, RlhfError.exit_code)
    _print(result)
    os._exit(0)  # as above


def _print(line: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Leaves :func:`main` through every `finally`."""
    del frame
    signal.signal(number, signal.SIG_IGN)
    raise _InterruptedError


if __name__ == "__main__":
    main()
