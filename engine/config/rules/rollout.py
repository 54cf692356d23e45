"""Rules between the keys of `rollout` and those of other sections."""

from collections.abc import Iterator

from engine.config.mistakes import mistakes_of
from engine.config.rules.launch import check_address, gpu_mistakes
from engine.config.schema import RunConfig


def rollout_mistakes(config: RunConfig) -> Iterator[str]:
    """The mistakes in where and when responses are generated."""
    if "" in config.rollout.stop:
        yield (
            "rollout.stop must not contain an empty text, which would end each response after its "
            "first token"
        )
    if (bounds := config.rollout.dynamic_range) is not None:
        if not config.rollout.dynamic:
            yield "rollout.dynamic_range needs rollout.dynamic: true"
        if not bounds[0] < bounds[1]:
            yield (f"rollout.dynamic_range must rise: {bounds[0]:g} is not below {bounds[1]:g}")
    if config.rollout.ahead:
        yield from _ahead_mistakes(config)
    if config.rollout.uses_vllm:
        yield from _device_mistakes(config)


def _ahead_mistakes(config: RunConfig) -> Iterator[str]:
    rollout = config.rollout
    native = rollout.engine == "native"
    if native:
        yield (
            "rollout.ahead needs rollout.engine: vllm, because native rollouts use the model that "
            "is being updated"
        )
    if config.ppo.rollout_correction == "none":
        yield (
            "rollout.ahead needs ppo.rollout_correction: truncate or mask, for instance, because "
            "the responses are sampled with older weights than those that are updated"
        )
    if not native and rollout.transfer != "file":
        yield (
            "rollout.ahead needs rollout.transfer: file, from which another engine is given the "
            "same weights if one ends"
        )
    if not native and rollout.sleep:
        yield "rollout.ahead needs rollout.sleep: 0, because vLLM works all the time"


def _device_mistakes(config: RunConfig) -> Iterator[str]:
    rollout, launch = config.rollout, config.launch
    yield from gpu_mistakes("rollout", rollout.gpus)
    yield from _number_mistakes(config)
    yield from _joined_mistakes(config)
    if launch.device == "cpu":
        for key in ("sleep", "gpus"):
            if getattr(rollout, key):
                yield f"rollout.{key} needs a GPU, and launch.device is cpu"
        if rollout.transfer == "ipc":
            yield "rollout.transfer: ipc needs a GPU, and launch.device is cpu"
    if rollout.transfer == "broadcast" and set(rollout.gpus) & set(launch.gpus[:1]):
        yield (
            "rollout.transfer: broadcast needs rollout.gpus without the GPU of rank 0: NCCL takes "
            "one member on a GPU; use ipc on the same one"
        )
    if rollout.transfer != "ipc" or launch.device == "cpu":
        return
    if rollout.tensor_parallel > 1:
        yield ("rollout.transfer: ipc needs rollout.tensor_parallel: 1; use broadcast with more")
    if rollout.engines > 1:
        yield (
            "rollout.transfer: ipc needs rollout.engines: 1, because it reaches the GPU of rank 0 "
            "alone; use file or broadcast with more"
        )
    if rollout.gpus and rollout.gpus[0] not in (launch.gpus or rollout.gpus)[:1]:
        yield (
            "rollout.transfer: ipc needs the GPU of rank 0 first in rollout.gpus; use broadcast on "
            "other GPUs"
        )


def _number_mistakes(config: RunConfig) -> Iterator[str]:
    """The mistakes in the number of engines: there are GPUs and responses for all of them.

    Which GPUs there are is not known here if no key names them: see
    :func:`engine.launch.rollout.engine.check_rollout_engine`.
    """
    rollout, launch = config.rollout, config.launch
    if rollout.engines == 1:
        if rollout.gpus and rollout.local_engines and len(rollout.gpus) < rollout.tensor_parallel:
            yield (
                f"rollout.tensor_parallel ({rollout.tensor_parallel}) needs as many GPUs in "
                f"rollout.gpus, not {len(rollout.gpus)}"
            )
        return
    if rollout.engines > rollout.batch_size:
        yield (
            f"rollout.engines ({rollout.engines}) must be at most rollout.batch_size "
            f"({rollout.batch_size}): each generates a part of the responses of a step"
        )
    key, gpus = ("rollout", rollout.gpus) if rollout.gpus else ("launch", launch.gpus)
    needed = rollout.local_engines * rollout.tensor_parallel
    if launch.device != "cpu" and gpus and len(gpus) < needed:
        yield (
            f"rollout.engines ({rollout.local_engines} here) with rollout.tensor_parallel "
            f"({rollout.tensor_parallel}) needs {needed} GPUs, and {key}.gpus has {len(gpus)}"
        )


def _joined_mistakes(config: RunConfig) -> Iterator[str]:
    """The mistakes in what engines on other machines need."""
    rollout, launch = config.rollout, config.launch
    if not rollout.joined:
        return
    if rollout.joined > rollout.engines:
        yield (
            f"rollout.joined ({rollout.joined}) must be at most rollout.engines "
            f"({rollout.engines}), which counts those on other machines, too"
        )
    if rollout.rendezvous is None:
        yield (
            f"rollout.joined: {rollout.joined} needs rollout.rendezvous: HOST:PORT, at which the "
            "other machines reach this one"
        )
    else:
        yield from mistakes_of(check_address, rollout.rendezvous)
        port = rollout.rendezvous.rpartition(":")[2]
        if launch.nodes > 1 and (launch.rendezvous or "").rpartition(":")[2] == port:
            yield f"rollout.rendezvous needs another port than launch.rendezvous, not {port}"
    if rollout.transfer != "file":
        yield ("rollout.joined needs rollout.transfer: file, which is sent to the other machines")
