"""The rollout engine's process: serves rank 0 on a Unix socket until it disconnects.

It has one model and one client. After an error it reports the error and exits, because its state
can no longer be trusted. The supervisor then starts a new process.
"""

import importlib.metadata
import logging
import os
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

from engine.errors import LinkError, first_line
from engine.log_lines import log_to
from engine.protocol.rollout.messages import (
    EngineFailed,
    EngineReady,
    Generate,
    Generated,
    LoadWeights,
    Start,
    WeightsLoaded,
)
from engine.protocol.rollout.server import FAILED, first_client, receive, report, send
from engine.train.rollout.vllm.process.sleep_mode import SleepMode
from engine.train.rollout.vllm.process.turns import Turns

log = logging.getLogger("rollout")

VLLM_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: no engine core that could be left
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # V2 refuses logits processors
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the ranks use the same cores in turn
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whether there is a GPU, without the use of it
    "HF_HUB_OFFLINE": "1",  # the model's folder has all that is read
}
CPU_SETTINGS = {
    "TORCHDYNAMO_DISABLE": "1",  # on a GPU, what vLLM compiles carries its CUDA graphs
}
SHARE_OF_FREE_MEMORY = 0.01
"""Share of a GPU's memory that must be free when the engine starts. vLLM's default of nine tenths
fails next to a rank, and only matters for a cache whose size is not given in bytes."""


def main(listener_fd: int) -> NoReturn:
    """Serves one client on a listening socket that the supervisor has opened."""
    log_to(sys.stdout)
    for name, value in VLLM_SETTINGS.items():
        os.environ.setdefault(name, value)
    log.info("rollout engine, pid %d: importing vLLM", os.getpid())
    problem = None
    try:
        import torch  # noqa: PLC0415 - of vLLM's environment

        if not torch.cuda.is_available():
            for name, value in CPU_SETTINGS.items():
                os.environ.setdefault(name, value)
        import vllm  # noqa: PLC0415 - takes ten seconds, and may be missing
    except ImportError as error:
        problem = missing(error)
    else:
        log.info("vLLM %s", vllm.__version__)
    connection, start = first_client(socket.socket(fileno=listener_fd))
    try:
        if problem is not None:
            send(connection, problem)
            exit_now(FAILED)
        serve(connection, start)
    except OSError as error:
        log.info("rank 0 has disconnected (%s)", error)
        exit_now(0)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {first_line(error)}"
        # A message that is too large would be too large again.
        report(connection, EngineFailed(text=text, final=isinstance(error, LinkError)))
        exit_now(FAILED)


def missing(error: ImportError) -> EngineFailed:
    """Describes why vLLM cannot be imported, with the remedy."""
    text = (
        f"rollout.engine is vllm, but {sys.executable} cannot import it ({first_line(error)}): "
        "make its environment with `make vllm` and name its Python in rollout.python"
    )
    return EngineFailed(text=text, user_input=True, final=True)


def exit_now(status: int) -> NoReturn:
    """Exits at once: vLLM's and torch's threads may keep the interpreter from ending."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(connection: socket.socket, start: Start) -> NoReturn:
    """Carries out a client's messages until it disconnects, which raises OSError."""
    engine = Engine(start, connection)
    send(connection, engine.ready)
    while True:
        match receive(connection):
            case LoadWeights() as update:
                send(connection, engine.load(update))
            case Generate() as request:
                send(connection, engine.generate(request))
            case other:
                raise TypeError(f"unexpected message {other}")


class Engine:
    """vLLM with the policy's architecture."""

    def __init__(self, start: Start, connection: socket.socket) -> None:
        """Builds the model, with random weights.

        Raises:
            Exception: what vLLM raises for a model that it cannot build.
        """
        import torch  # noqa: PLC0415 - with vLLM
        from vllm import LLM  # noqa: PLC0415

        self._connection = connection
        self._weights_version: int | None = None
        self._workers = start.tensor_parallel
        on_gpu = torch.cuda.is_available()
        began = time.perf_counter()
        self._llm: Any = LLM(**llm_arguments(start, on_gpu=on_gpu))
        self._sleep = SleepMode(self._llm, start.sleep)
        log.info("built the model in %.1f s", time.perf_counter() - began)
        self.ready = EngineReady(
            pid=os.getpid(),
            engine=f"vllm {importlib.metadata.version(vllm_package())}",
            packages={p: importlib.metadata.version(p) for p in ("torch", "transformers")},
            device="cuda" if on_gpu else "cpu",
        )

    def load(self, update: LoadWeights) -> WeightsLoaded:
        """Replaces the weights, and empties the prefix cache, which holds keys of the old ones."""
        self._weights_version = None
        named = [(t.name, t.shape) for t in update.tensors]
        calls: dict[str, tuple[str, tuple[Any, ...]]] = {
            "file": ("load_weights_file", (update.path, named, update.checksum)),
            "ipc": ("load_weights_ipc", (update.handles, named, update.gpu, update.checksum)),
            "broadcast": (
                "load_weights_broadcast",
                (update.path, self._workers + 1, named, update.tensors[0].dtype),
            ),
        }
        method, args = calls[update.transfer]
        self._sleep.before_load()
        results = self._llm.collective_rpc(method, args=args)
        self._sleep.before_generate()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied")
        self._weights_version = update.weights_version
        count, held, seconds = results[0]
        return WeightsLoaded(
            weights_version=update.weights_version,
            tensors=count,
            checksum=held,
            seconds=seconds,
        )

    def generate(self, request: Generate) -> Generated:
        """Generates the turns that the client sends."""
        if request.weights_version != self._weights_version:
            raise RuntimeError(
                f"asked for weights of version {request.weights_version}, and version "
                f"{self._weights_version} is loaded"
            )
        self._sleep.before_generate()
        if not request.later_turn:
            # What is cached depends on earlier batches and would change results by rounding.
            self._llm.reset_prefix_cache()
        Turns(self._llm, request, self._connection).run()
        self._sleep.after_generate()
        if self._sleep.forgets_weights:
            self._weights_version = None
        return Generated(weights_version=request.weights_version)


def llm_arguments(start: Start, *, on_gpu: bool) -> dict[str, Any]:
    """The arguments of vLLM's `LLM`."""
    shared = {"gpu_memory_utilization": SHARE_OF_FREE_MEMORY} if on_gpu else {}
    return {
        **shared,
        "model": start.model,
        "skip_tokenizer_init": True,
        "load_format": "dummy",  # rank 0 sends the weights
        "dtype": start.dtype,
        "seed": 0,
        "max_model_len": start.max_tokens,
        "max_num_seqs": start.max_responses,
        "kv_cache_memory_bytes": start.cache_bytes,
        "tensor_parallel_size": start.tensor_parallel,
        "enforce_eager": not on_gpu,
        "enable_prefix_caching": True,
        "enable_sleep_mode": start.sleep > 0,
        "async_scheduling": False,  # the output's length is the position that is sampled
        "generation_config": "vllm",  # no defaults of the model's generation_config.json
        "worker_extension_cls": (
            "engine.train.rollout.vllm.process.worker_extension.RolloutWorkerExtension"
        ),
        "logits_processors": ["engine.train.rollout.vllm.process.uniform_sampling:UniformSampling"],
        "disable_log_stats": True,
    }


def vllm_package() -> str:
    """The name of the installed distribution: the CPU build of vLLM has one of its own."""
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    return names[0]
