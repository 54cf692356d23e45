"""Rules between the keys of `rollout` and those of other sections."""

from engine.config.rules.launch import check_address, check_gpus
from engine.config.schema import RunConfig
from engine.errors import ConfigError


def check_rollout(config: RunConfig) -> None:
    """Checks where and when responses are generated.

    Raises:
        ConfigError: keys contradict each other; the message names them and a remedy.
    """
    if "" in config.rollout.stop:
        raise ConfigError(
            "rollout.stop must not contain an empty text, which would end each response after its "
            "first token"
        )
    if (bounds := config.rollout.dynamic_range) is not None:
        if not config.rollout.dynamic:
            raise ConfigError("rollout.dynamic_range needs rollout.dynamic: true")
        if not bounds[0] < bounds[1]:
            raise ConfigError(
                f"rollout.dynamic_range must rise: {bounds[0]:g} is not below {bounds[1]:g}"
            )
    if config.rollout.ahead:
        _check_ahead(config)
    if config.rollout.uses_vllm:
        _check_devices(config)


def _check_ahead(config: RunConfig) -> None:
    rollout = config.rollout
    if rollout.engine == "native":
        raise ConfigError(
            "rollout.ahead needs rollout.engine: vllm, because native rollouts use the model that "
            "is being updated"
        )
    if config.ppo.rollout_correction == "none":
        raise ConfigError(
            "rollout.ahead needs ppo.rollout_correction: truncate or mask, for instance, because "
            "the responses are sampled with older weights than those that are updated"
        )
    if rollout.transfer != "file":
        raise ConfigError(
            "rollout.ahead needs rollout.transfer: file, from which another engine is given the "
            "same weights if one ends"
        )
    if rollout.sleep:
        raise ConfigError("rollout.ahead needs rollout.sleep: 0, because vLLM works all the time")


def _check_devices(config: RunConfig) -> None:
    rollout, launch = config.rollout, config.launch
    check_gpus("rollout", rollout.gpus)
    _check_number(config)
    _check_joined(config)
    if launch.device == "cpu":
        for key in ("sleep", "gpus"):
            if getattr(rollout, key):
                raise ConfigError(f"rollout.{key} needs a GPU, and launch.device is cpu")
        if rollout.transfer == "ipc":
            raise ConfigError("rollout.transfer: ipc needs a GPU, and launch.device is cpu")
    if rollout.transfer == "broadcast" and set(rollout.gpus) & set(launch.gpus[:1]):
        raise ConfigError(
            "rollout.transfer: broadcast needs rollout.gpus without the GPU of rank 0: NCCL takes "
            "one member on a GPU; use ipc on the same one"
        )
    if rollout.transfer != "ipc":
        return
    if rollout.tensor_parallel > 1:
        raise ConfigError(
            "rollout.transfer: ipc needs rollout.tensor_parallel: 1; use broadcast with more"
        )
    if rollout.engines > 1:
        raise ConfigError(
            "rollout.transfer: ipc needs rollout.engines: 1, because it reaches the GPU of rank 0 "
            "alone; use file or broadcast with more"
        )
    if rollout.gpus and rollout.gpus[0] not in (launch.gpus or rollout.gpus)[:1]:
        raise ConfigError(
            "rollout.transfer: ipc needs the GPU of rank 0 first in rollout.gpus; use broadcast on "
            "other GPUs"
        )


def _check_number(config: RunConfig) -> None:
    """Checks that there are GPUs for all engines, and responses.

    Which GPUs there are is not known here if no key names them: see
    :func:`engine.launch.rollout.engine.check_rollout_engine`.
    """
    rollout, launch = config.rollout, config.launch
    if rollout.engines == 1:
        if rollout.gpus and rollout.local_engines and len(rollout.gpus) < rollout.tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel ({rollout.tensor_parallel}) needs as many GPUs in "
                f"rollout.gpus, not {len(rollout.gpus)}"
            )
        return
    if rollout.engines > rollout.batch_size:
        raise ConfigError(
            f"rollout.engines ({rollout.engines}) must be at most rollout.batch_size "
            f"({rollout.batch_size}): each generates a part of the responses of a step"
        )
    key, gpus = ("rollout", rollout.gpus) if rollout.gpus else ("launch", launch.gpus)
    needed = rollout.local_engines * rollout.tensor_parallel
    if launch.device != "cpu" and gpus and len(gpus) < needed:
        raise ConfigError(
            f"rollout.engines ({rollout.local_engines} here) with rollout.tensor_parallel "
            f"({rollout.tensor_parallel}) needs {needed} GPUs, and {key}.gpus has {len(gpus)}"
        )


def _check_joined(config: RunConfig) -> None:
    """Checks what engines on other machines need."""
    rollout, launch = config.rollout, config.launch
    if not rollout.joined:
        return
    if rollout.joined > rollout.engines:
        raise ConfigError(
            f"rollout.joined ({rollout.joined}) must be at most rollout.engines "
            f"({rollout.engines}), which counts those on other machines, too"
        )
    if rollout.rendezvous is None:
        raise ConfigError(
            f"rollout.joined: {rollout.joined} needs rollout.rendezvous: HOST:PORT, at which the "
            "other machines reach this one"
        )
    _, port = check_address(rollout.rendezvous)
    if launch.nodes > 1 and (launch.rendezvous or "").rpartition(":")[2] == str(port):
        raise ConfigError(
            f"rollout.rendezvous needs another port than launch.rendezvous, not {port}"
        )
    if rollout.transfer != "file":
        raise ConfigError(
            "rollout.joined needs rollout.transfer: file, which is sent to the other machines"
        )
