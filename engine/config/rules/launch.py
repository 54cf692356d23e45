"""Rules between the keys of `launch`, and the batch that its ranks share."""

from collections.abc import Iterator

from engine.config.mistakes import mistakes_of
from engine.config.schema import RunConfig
from engine.errors import ConfigError


def launch_mistakes(config: RunConfig) -> Iterator[str]:
    """The mistakes in the number of ranks and in how machines find each other."""
    launch = config.launch
    if launch.nodes > 1 and launch.rendezvous is None:
        yield (
            f"launch.nodes: {launch.nodes} needs launch.rendezvous: HOST:PORT, at which the other "
            "machines reach this one"
        )
    if launch.fewest_nodes > launch.nodes:
        yield (
            f"launch.min_nodes ({launch.min_nodes}) must be at most launch.nodes ({launch.nodes})"
        )
    parallel = config.parallel
    if parallel.activations == "offload" and not parallel.activation_checkpointing:
        yield (
            "parallel.activations: offload needs parallel.activation_checkpointing: true: it moves "
            "what that keeps"
        )
    yield from gpu_mistakes("launch", launch.gpus)
    if launch.rendezvous is not None:
        yield from mistakes_of(check_address, launch.rendezvous)
    if 1 <= launch.preempted_exit <= 4:
        yield (
            f"launch.preempted_exit: {launch.preempted_exit} means something else already: give 0, "
            "or 5 to 125; 75 is customary"
        )
    per_node = launch.processes if isinstance(launch.processes, int) else 1
    if config.prompts_per_step < launch.nodes * per_node:
        yield (
            f"{launch.nodes * per_node} ranks need at least as many prompts per step, not "
            f"{config.prompts_per_step}: raise rollout.batch_size"
        )


def gpu_mistakes(section: str, gpus: list[int]) -> Iterator[str]:
    """A mistake if `gpus` names one twice, for which CUDA finds no GPU at all."""
    twice = [gpu for gpu in gpus if gpus.count(gpu) > 1]
    if twice:
        yield f"{section}.gpus has GPU {twice[0]} more than once"


def check_address(text: str) -> tuple[str, int]:
    """Splits `HOST:PORT` into host and port. Raises ConfigError for any other text."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"'{text}' is not an address: write HOST:PORT, such as 10.0.0.1:29400")
    return host, int(port)
