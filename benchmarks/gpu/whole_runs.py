"""Parts of the GPU check that start whole runs by the command line."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import memory
from benchmarks.gpu.findings import Finding, Target, below
from benchmarks.gpu.numerics import starter_run
from engine.journal.reader import JournalReader
from engine.session.checkpoints import complete_checkpoints
from engine.session.folder import SessionFolder
from engine.train.distributed.sharding import blocks

RESUMED_TOLERANCE = 1e-3
"""Relative: some of a GPU's sums are in no fixed order."""
DEADLINE = 240.0
"""Seconds that a run may take."""
SIZE = "rollout.batch_size=64 rollout.max_new_tokens=32"
TOO_MUCH = (
    "rollout.batch_size=2048 rollout.per_prompt=16 rollout.max_new_tokens=192 kl.controller=fixed"
)
"""A size whose key-value cache alone takes 4 GB: no smaller micro-batch helps."""
SMALL_SIZE = "rollout.batch_size=4 rollout.max_new_tokens=4 ppo.minibatches=1 ppo.epochs=1"


def words(target: Target, name: str, verb: str, *rest: str) -> list[str]:
    """The command line for a session; what a part gives comes last, so that it holds."""
    if verb != "demo":
        return [verb, name, "--headless", *rest]
    size = SIZE if target.real else SMALL_SIZE
    keys = [f"launch.device={target.launch_device}", *size.split()]
    return [verb, "--name", name, "--headless", *options(keys), *rest]


def options(keys: list[str]) -> list[str]:
    """Keys of the configuration as options of the command line."""
    return [word for key in keys for word in ("-o", key)]


def start(target: Target, name: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts the command line with a session's name, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "rlhf_tui.cli", *words(target, name, *arguments),
         "--sessions", str(target.folder / "sessions")],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and the output of a run; it is killed at the deadline."""
    try:
        output, _ = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return process.returncode, output


def last_line(output: str) -> str:
    """The last line of a run's output, without the session's folder."""
    return (output.strip().splitlines() or ["no output"])[-1].partition("; session ")[0]


def session(target: Target, name: str) -> SessionFolder:
    """The folder of a session that a part has started."""
    return SessionFolder(target.folder / "sessions" / name)


def metrics(target: Target, name: str) -> dict[str, dict[int, float]]:
    """All metrics of a session by name and step, times and memory left out."""
    with JournalReader(session(target, name)) as reader:
        return {
            metric: {
                step: value for step, value in reader.metrics.series(metric) if value is not None
            }
            for metric in reader.metrics.names()
            if not metric.startswith(("time/", "perf/", "gpu/", "system/"))
        }


def starter_learns(target: Target) -> Iterator[Finding]:
    """Twenty steps of the starter: finite numbers, a higher score, on the device asked for."""
    steps = 20 if target.real else 2
    code, output = finish(start(target, "learns", "demo", "--steps", str(steps)))
    yield Finding(
        f"{steps} steps of the starter", code == 0, f"exit code {code}; {last_line(output)}"
    )
    found = metrics(target, "learns")
    values = [v for series in found.values() for v in series.values()]
    bad = sum(not math.isfinite(v) for v in values)
    yield Finding("its metrics are finite", not bad, f"{bad} of {len(values)} are not")
    with JournalReader(session(target, "learns")) as reader:
        ready = next((e.as_json() for e in reader.events() if e.kind == "ready"), {})
    device = str(ready.get("device"))
    yield Finding("it ran on the device", device.startswith(target.launch_device), device)
    score = found["objective/scores"]
    rise = score[steps] - score[1]
    yield Finding(
        "its score rises", rise > 0.5 or not target.real, f"{score[1]:.2f} → {score[steps]:.2f}"
    )
    log = session(target, "learns").folder / "engine.log"
    graphs = "without CUDA graphs" not in log.read_text(errors="replace")
    yield Finding("it generates with CUDA graphs", graphs, "as the log says")


def killed_and_resumed(target: Target) -> Iterator[Finding]:
    """A run killed after its second save and resumed has the numbers of an undisturbed one."""
    steps = 6
    saving = ["--steps", str(steps), "-o", "train.save_every=2"]
    code, output = finish(start(target, "undisturbed", "demo", *saving))
    yield Finding("an undisturbed run", code == 0, last_line(output))
    process = start(target, "killed", "demo", *saving)
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < deadline:
        if len(complete_checkpoints(session(target, "killed").checkpoints)) >= 2:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    process.communicate()
    yield Finding(
        "killed after its second save", process.returncode == -signal.SIGKILL,
        f"exit code {process.returncode}",
    )  # fmt: skip
    code, output = finish(start(target, "killed", "resume"))
    yield Finding("resumed", code == 0, last_line(output))
    yield same_metrics(target, "undisturbed", "killed", "resumed and undisturbed")


def same_metrics(target: Target, one: str, other: str, what: str) -> Finding:
    """A finding that two sessions have the same metrics; `what` are the two in words."""
    expected, found = metrics(target, one), metrics(target, other)
    worst, name = 0.0, ""
    for metric, series in expected.items():
        for step, value in series.items():
            gap = abs(found.get(metric, {}).get(step, math.nan) - value) / max(abs(value), 0.1)
            gap = math.inf if math.isnan(gap) else gap
            worst, name = max((worst, name), (gap, f"{metric} of step {step}"))
    return below(f"{what} ({name} differs most)", worst, RESUMED_TOLERANCE)


def two_ranks(target: Target) -> Iterator[Finding]:
    """Two ranks, replicated and sharded, have the metrics of one; on GPUs over NCCL."""
    if target.real and torch.cuda.device_count() < 2:
        yield Finding("two ranks", passed=True, measured="need two GPUs")
        return
    size = ["--steps", "2", *options(["model.dtype=float32", "launch.threads=1"])]
    alone = start(target, "alone", "demo", *size, *options(["launch.processes=1"]))
    code, output = finish(alone)
    yield Finding("one rank", code == 0, last_line(output))
    for strategy in ("ddp", "fsdp"):
        keys = options(["launch.processes=2", f"parallel.strategy={strategy}"])
        code, output = finish(start(target, strategy, "demo", *size, *keys))
        yield Finding(f"two ranks, {strategy}", code == 0, last_line(output))
        yield same_metrics(target, "alone", strategy, f"two ranks and one, {strategy}")


def out_of_memory(target: Target) -> Iterator[Finding]:
    """A GPU without free memory is reported as that, in one line that says what would help."""
    if not target.real:
        yield Finding("out of memory in one line", passed=True, measured="needs a GPU's memory")
        return
    held = list(all_memory_but(1200 << 20, target.device))
    try:
        process = start(target, "full", "demo", "--steps", "2", *options(TOO_MUCH.split()))
        code, output = finish(process)
    finally:
        del held
        torch.cuda.empty_cache()
    lines = [x for x in output.splitlines() if "out of memory" in x]
    starts = output.count("attempt")
    yield Finding(
        "out of memory in one line that says what would help",
        code != 0 and bool(lines) and "micro_batch_size" in lines[-1] and "Traceback" not in output,
        f"exit code {code}: {lines[-1] if lines else output[-300:]}", {"restarts": float(starts)},
    )  # fmt: skip


def all_memory_but(spare: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Tensors that leave some bytes free, until that has been so for two seconds.

    The memory of a process that has just ended is freed after its end.
    """
    since = time.monotonic()
    while time.monotonic() - since < 2.0:
        more = torch.cuda.mem_get_info()[0] - spare
        if more > 64 << 20:
            yield torch.empty(more, dtype=torch.uint8, device=device)
            since = time.monotonic()
        time.sleep(0.05)


def sharded_on_one(target: Target) -> Iterator[Finding]:
    """A model sharded by FSDP2 over NCCL, on one GPU, has the unsharded one's gradients."""
    run = starter_run(target, target.device, "model.dtype=float32")
    lm = run.policy.lm
    ids = torch.arange(64, device=target.device).reshape(4, 16) + 10

    def loss_and_gradient() -> tuple[float, float]:
        lm.zero_grad()
        logits = lm(input_ids=ids, use_cache=False).logits
        loss = torch.log_softmax(logits.float(), -1)[..., 5].sum()
        loss.backward()
        squares = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                   for p in lm.parameters() if p.grad is not None]  # fmt: skip
        return float(loss), float(sum(g.double().square().sum() for g in squares)) ** 0.5

    expected = loss_and_gradient()
    if not target.real:
        yield Finding("FSDP2 on one GPU", passed=True, measured="needs NCCL")
        return
    store = dist.FileStore(str(target.folder / "store"), 1)  # type: ignore[attr-defined]  # torch exports it without saying so
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=target.device)
    try:
        mesh = init_device_mesh("cuda", (1,))
        for block in blocks(lm):
            fully_shard(block, mesh=mesh)
        fully_shard(lm, mesh=mesh)
        found = loss_and_gradient()
    finally:
        dist.destroy_process_group()
    for what, one, other in zip(("loss", "norm of the gradient"), expected, found, strict=True):
        yield below(f"FSDP2 over NCCL on one GPU: {what}", abs(other / one - 1), 1e-5)


def planner(target: Target) -> Iterator[Finding]:
    """The memory planner's estimates are near the measured peaks."""
    cases = memory.ON_GPU if target.real else memory.ON_CPU[:1]
    always = f"{memory.SHORT} launch.device={target.launch_device} launch.threads=1"
    models = {model: memory.write_model(model, target.folder) for model, _ in cases}

    def measure(case: memory.Case) -> Finding:
        model, settings = case
        overrides = [*models[model], *always.split(), *settings.split()]
        name = f"planned-{cases.index(case)}"
        estimate, measured = memory.run(target.folder, name, overrides)
        off = estimate / measured - 1
        return Finding(
            f"memory, {model}: {settings or 'defaults'}", abs(off) <= memory.TOLERANCE,
            f"estimated {estimate:.2f} GB, measured {measured:.2f} GB, off by {off:+.0%}",
            {"estimate": estimate, "measured": measured},
        )  # fmt: skip

    with ThreadPoolExecutor(len(cases)) as pool:  # each measures the memory of its own process
        yield from pool.map(measure, cases)
