"""Binds the arguments that we pass to the signatures of the installed vLLM; run by its Python."""

import dataclasses
import inspect
import sys
from pathlib import Path

from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs

sys.path.insert(0, str(Path(__file__).parents[2] / "engine/train/rollout/vllm/process"))
import start  # noqa: F401 - makes `engine` importable

from engine.protocol.rollout.messages import Start
from engine.train.rollout.vllm.process import engine_process, received_weights
from engine.train.rollout.vllm.process.sleep_mode import SleepMode


class Recorder:
    """Takes the place of an engine: keeps the calls, by name."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def main():
    llm = Recorder()
    for level in (1, 2):
        mode = SleepMode(llm, level)
        mode.before_generate()
        mode.after_generate()
        mode.before_load()
        mode.before_generate()
    for name, args, kwargs in llm.calls:
        inspect.signature(getattr(LLM, name)).bind(llm, *args, **kwargs)
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    assert names[received_weights.DEVICE_OF_HANDLE] == "storage_device", names
    known = {f.name for f in dataclasses.fields(EngineArgs)}
    known |= set(inspect.signature(LLM).parameters)
    started = Start(
        model="m", dtype="float32", max_tokens=1, max_responses=1, cache_bytes=1, sleep=1
    )
    unknown = set(engine_process.llm_arguments(started, on_gpu=True)) - known
    assert not unknown, unknown
    sys.stdout.write(f"{len(llm.calls)} calls\n")


if __name__ == "__main__":
    main()
