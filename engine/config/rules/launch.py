"""Rules between the keys of `launch`, and the batch that its ranks share."""

from engine.config.schema import RunConfig
from engine.errors import ConfigError


def check_launch(config: RunConfig) -> None:
    """Checks the number of ranks and how machines find each other.

    Raises:
        ConfigError: keys contradict each other; the message names them and a remedy.
    """
    launch = config.launch
    if launch.nodes > 1 and launch.rendezvous is None:
        raise ConfigError(
            f"launch.nodes: {launch.nodes} needs launch.rendezvous: HOST:PORT, at which the other "
            "machines reach this one"
        )
    if launch.fewest_nodes > launch.nodes:
        raise ConfigError(
            f"launch.min_nodes ({launch.min_nodes}) must be at most launch.nodes ({launch.nodes})"
        )
    parallel = config.parallel
    if parallel.activations == "offload" and not parallel.activation_checkpointing:
        raise ConfigError(
            "parallel.activations: offload needs parallel.activation_checkpointing: true: it moves "
            "what that keeps"
        )
    check_gpus("launch", launch.gpus)
    if launch.rendezvous is not None:
        check_address(launch.rendezvous)
    if 1 <= launch.preempted_exit <= 4:
        raise ConfigError(
            f"launch.preempted_exit: {launch.preempted_exit} means something else already: give 0, "
            "or 5 to 125; 75 is customary"
        )
    per_node = launch.processes if isinstance(launch.processes, int) else 1
    if config.prompts_per_step < launch.nodes * per_node:
        raise ConfigError(
            f"{launch.nodes * per_node} ranks need at least as many prompts per step, not "
            f"{config.prompts_per_step}: raise rollout.batch_size"
        )


def check_gpus(section: str, gpus: list[int]) -> None:
    """Checks that `gpus` names none twice, for which CUDA finds no GPU at all."""
    twice = [gpu for gpu in gpus if gpus.count(gpu) > 1]
    if twice:
        raise ConfigError(f"{section}.gpus has GPU {twice[0]} more than once")


def check_address(text: str) -> tuple[str, int]:
    """Splits `HOST:PORT` into host and port. Raises ConfigError for any other text."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"'{text}' is not an address: write HOST:PORT, such as 10.0.0.1:29400")
    return host, int(port)
