"""A part of the GPU check: weights that one process sends are those that another one receives.

A process with the environment of a rank sends weights by the code of rank 0. Another one, with the
environment of a rollout engine, receives them by the code of the engine's worker, in place of which
it stands: vLLM is not needed.
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.findings import Finding, Target
from engine import starter
from engine.config import file as config_file
from engine.launch.environment import ROLLOUT_SOCKET_VARIABLE, rank_environment
from engine.launch.rollout.engine import PYTHON_VARIABLES, rollout_environment
from engine.protocol import frames, sockets
from engine.protocol.rollout.messages import (
    EngineReady,
    LoadWeights,
    Start,
    TensorInfo,
    WeightsLoaded,
    decode_to_engine,
)
from engine.train.rollout.vllm.checksum import checksum
from engine.train.rollout.vllm.client import EngineLostError, RolloutClient
from engine.train.rollout.vllm.group import WeightsGroup
from engine.train.rollout.vllm.process.received_weights import (
    DTYPES,
    from_broadcast,
    from_file,
    from_ipc,
)
from engine.train.rollout.vllm.updates import BroadcastUpdate, FileUpdate, IpcUpdate, Update
from engine.train.rollout.vllm.weights import DTYPES as NAMES

ROOT = Path(__file__).parents[2]
MODULE = "benchmarks.gpu.weights_transfer"
SHAPES = {"bias": [7], "norm": [1024], "odd": [333, 77], "matrix": [2048, 2048]}
"""Of less than a page up to more than a small block of the allocator."""
UPDATES = 3
"""In a row, to the same receiver."""
DEADLINE = 240.0
"""Seconds for both processes."""
VANISHES = -1
"""The version of an update that the receiver does not live to report."""


def weights_to_another_process(target: Target) -> Iterator[Finding]:
    """Weights by a file, by CUDA IPC and by a broadcast arrive to the last bit."""
    config = config_file.load(
        starter.FOLDER / "demo.yaml",
        ["rollout.engine=vllm", f"launch.device={target.launch_device}", "launch.threads=1"],
    )
    environment = rank_environment(config.launch)
    plain = {k: v for k, v in environment.items() if not k.endswith("ALLOC_CONF")}
    as_a_rank = "expandable_segments:True" in str(environment)
    senders = {"as a rank": environment}
    if as_a_rank:
        senders["torch's own allocator"] = plain
    with ThreadPoolExecutor() as pool:  # each waits for processes of its own
        results = pool.map(sent, senders.values())
    for name, done in zip(senders, results, strict=True):
        found = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
        for entry in found:
            yield Finding(**entry | {"name": f"{entry['name']}, {name}"})
        # Of both processes: the receiver's says why the sender has lost it.
        errors = [x for x in done.stderr.splitlines() if "Error" in x and not x.startswith(" ")]
        yield Finding(
            f"weights were sent, {name}", done.returncode == 0 and bool(found),
            " | ".join(errors) or "no error",
        )  # fmt: skip
    if not target.real:
        yield Finding("weights by CUDA IPC", passed=True, measured="needs a GPU")


def sent(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a sender."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", MODULE, "send"], cwd=ROOT, env=environment,
        text=True, timeout=DEADLINE, capture_output=True, check=False,
    )  # fmt: skip


# -- the sender, in place of rank 0 ------------------------------------------------------------


def send() -> None:
    """Sends weights to receivers; prints a finding a line, as JSON."""
    on_gpu = torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for found in sent_findings(folder, device):
            sys.stdout.write(json.dumps(asdict(found)) + "\n")
            sys.stdout.flush()


def sent_findings(folder: Path, device: torch.device) -> Iterator[Finding]:
    """What the sender finds, for each way of sending and two dtypes."""
    ways = ["file", *(["ipc"] if device.type == "cuda" else ["broadcast"])]
    with receiver(folder, device) as client:
        for way in ways:
            for dtype in (torch.float32, torch.bfloat16):
                yield same_bits(client, folder, device, way, dtype)
    if device.type != "cuda":
        return
    yield memory_comes_back(folder, device)
    # Two processes on one GPU cannot be in one NCCL group.
    group = WeightsGroup(str(folder / "alone"), 0, 1, device)
    tensor = torch.arange(10.0, device=device)
    group.broadcast(tensor)
    yield Finding("NCCL, a group of one", tensor.tolist() == list(range(10)), "broadcast")


def same_bits(
    client: RolloutClient, folder: Path, device: torch.device, way: str, dtype: torch.dtype
) -> Finding:
    """Three updates in a row have the sender's checksum and SHA-256 on arrival."""
    name = f"weights by {way} in {NAMES[dtype]} to another process"
    seconds, equal = [], 0
    for version in range(UPDATES):
        began = time.perf_counter()
        expected = send_update(client, folder, device, way, dtype, version)
        seconds.append(time.perf_counter() - began)
        equal += (folder / "received").read_text() == expected
    text = f"{equal} of {UPDATES} updates equal to the last bit, {min(seconds):.3f} s each"
    return Finding(name, equal == UPDATES, text, {"seconds": min(seconds)})


def memory_comes_back(folder: Path, device: torch.device) -> Finding:
    """What was exported is freed after an update, and after a receiver that has died."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    lost = False
    for version in (VANISHES, 0):
        with receiver(folder, device) as client:
            try:
                send_update(client, folder, device, "ipc", torch.float32, version)
            except EngineLostError:
                lost = version == VANISHES
    held = torch.cuda.memory_allocated(device) - before
    text = f"{held} bytes held; the receiver's death was {'told' if lost else 'not told'}"
    return Finding("exported memory comes back, also of a receiver that died", lost and not held,
                   text, {"bytes": float(held)})  # fmt: skip


def send_update(
    client: RolloutClient, folder: Path, device: torch.device, way: str, dtype: torch.dtype,
    version: int,
) -> str:  # fmt: skip
    """Sends weights that depend on the version; returns their SHA-256."""
    tensors = [TensorInfo(name, shape, NAMES[dtype]) for name, shape in SHAPES.items()]
    update: Update
    if way == "ipc":
        update = IpcUpdate(client, version, tensors, dtype)
    elif way == "file":
        update = FileUpdate([client], version, tensors, dtype, folder / "weights.safetensors")
    else:
        update = BroadcastUpdate(
            [client], version, tensors, dtype,
            rendezvous=folder / "group", workers=1, device=device,
        )  # fmt: skip
    with closing(update):
        generator = torch.Generator().manual_seed(version % 100)
        made = (torch.randn(t.shape, generator=generator).to(device) for t in tensors)
        sent = [update.take(tensor) for tensor in made]
        update.finish(checksum(sent))
        return sha256(sent)


def sha256(tensors: Iterable[Tensor]) -> str:
    """The hash of the bytes of some tensors, one after the other."""
    found = hashlib.sha256()
    for tensor in tensors:
        host = tensor.detach().cpu().contiguous().view(-1)
        found.update(host.view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextmanager
def receiver(folder: Path, device: torch.device) -> Iterator[RolloutClient]:
    """Context with a receiver in a process of its own and a client that is connected to it."""
    config = config_file.load(
        starter.FOLDER / "demo.yaml",
        ["rollout.engine=vllm", f"launch.device={device.type}", "launch.threads=1"],
    )
    # Unlike vLLM, the receiver has this environment's packages, wherever they are.
    same_packages = {k: os.environ[k] for k in PYTHON_VARIABLES if k in os.environ}
    listener, path = sockets.listen(folder, sockets.ROLLOUT_NAME)
    os.environ[ROLLOUT_SOCKET_VARIABLE] = str(path)
    client = RolloutClient()
    with listener:  # and no longer: if the receiver dies, the connection must end
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", MODULE, "receive",
             str(listener.fileno()), str(folder)],
            cwd=ROOT, env=rollout_environment(config) | same_packages, pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        client.begin(Start(model="", dtype="", max_tokens=0, max_responses=0, cache_bytes=0))
    try:
        client.wait_ready()
        yield client
    finally:
        client.close()
        process.kill()
        process.wait()


# -- the receiver, in place of the engine ------------------------------------------------------


def receive(listener_fd: int, folder: Path) -> None:
    """Receives weights until the sender disconnects; writes their SHA-256 to a file."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    connection, _ = socket.socket(fileno=listener_fd).accept()
    groups: list[WeightsGroup] = []
    while True:
        try:
            message = decode_to_engine(frames.receive(connection))
        except ConnectionError:
            return
        if not isinstance(message, LoadWeights):
            ready = EngineReady(pid=os.getpid(), engine="a receiver", device=device.type)
            connection.sendall(frames.encode(ready))
            continue
        began = time.perf_counter()
        copies = [t.to(device, copy=True) for _, t in incoming(message, device, groups)]
        if on_gpu:
            torch.cuda.synchronize()
        if message.weights_version == VANISHES:
            os._exit(1)
        (folder / "received").write_text(sha256(copies))
        connection.sendall(frames.encode(WeightsLoaded(
            weights_version=message.weights_version, tensors=len(copies),
            checksum=checksum(copies), seconds=time.perf_counter() - began,
        )))  # fmt: skip


def incoming(
    update: LoadWeights, device: torch.device, groups: list[WeightsGroup]
) -> Iterable[tuple[str, Tensor]]:
    """The tensors of an update, as :class:`RolloutWorkerExtension` receives them."""
    tensors = [(t.name, t.shape) for t in update.tensors]
    if update.transfer == "file":
        return from_file(update.path, tensors)
    if update.transfer == "ipc":
        return list(from_ipc(update.handles, tensors, update.gpu, device))
    if update.path:
        groups[:] = [WeightsGroup(update.path, 1, 2, device)]
    return from_broadcast(groups[0], tensors, DTYPES[update.tensors[0].dtype])


def main() -> None:
    """Runs one of the two processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["send", "receive"])
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    sides: dict[str, Callable[[], None]] = {
        "send": send,
        "receive": lambda: receive(int(options.rest[0]), Path(options.rest[1])),
    }
    sides[options.side]()


if __name__ == "__main__":
    main()
