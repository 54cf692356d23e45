"""Binds the arguments that we pass to the signatures of the installed vLLM; run by its Python."""

import inspect
import sys
from pathlib import Path

from vllm import LLM
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.v1.worker.gpu_worker import Worker

sys.path.insert(0, str(Path(__file__).parents[2] / "engine/train/rollout/vllm"))
import start  # noqa: F401 - makes `engine` importable

from engine.train.rollout.vllm import gpu


class Recorder:
    """Takes the place of an engine: keeps the calls, by name."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def main():
    handles = [{"GPU-1": (1,)}]
    update = gpu.ipc_update(["a"], ["bfloat16"], [[1]], handles)
    IPCWeightTransferUpdateInfo(**update)
    llm = Recorder()
    gpu.sleep(llm)
    gpu.wake_for_weights(llm)
    gpu.wake_for_rollouts(llm)
    gpu.update_by_ipc(llm, update)
    gpu.join_nccl(llm, "127.0.0.1", 29500, 2)
    for name, args, kwargs in llm.calls:
        inspect.signature(getattr(LLM, name)).bind(llm, *args, **kwargs)
        if name == "collective_rpc":
            method, given = args[0], kwargs.get("args", ())
            inspect.signature(getattr(Worker, method)).bind(llm, *given)
            if method == "init_weight_transfer_engine":
                NCCLWeightTransferInitInfo(**given[0])
    sys.stdout.write(f"{len(llm.calls)} calls\n")


if __name__ == "__main__":
    main()
