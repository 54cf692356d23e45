"""The sections `launch` and `parallel`: processes, devices and the placement of models."""

from typing import Annotated, Literal

from msgspec import Meta

from engine.config.sections.base import Seconds, Section, Whole


class LaunchConfig(Section, frozen=True):
    """The processes of a run and their supervision."""

    processes: Annotated[int, Meta(ge=1, le=10_000)] | Literal["auto"] = "auto"
    """Ranks on each machine. `auto`: one for each GPU, or one on a machine without GPUs."""
    nodes: Annotated[int, Meta(ge=1, le=100_000)] = 1
    """Number of machines; the others join with `rlhf-tui join`."""
    min_nodes: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    """The run starts, and continues after a loss, with this many machines if no more have joined
    within `join_wait`; one that comes later takes part after the next checkpoint. Default: all of
    `nodes`."""
    join_wait: Seconds = 60.0
    """Seconds to wait for further machines once `min_nodes` have joined."""
    rendezvous: str | None = None
    """`HOST:PORT` at which other machines reach this one; required if `nodes` is above 1."""
    timeout: Seconds = 1800.0
    """Seconds that a rank waits for the others before it fails. Choose more than the slowest reward
    function, model download or journal write takes, because the other ranks wait for rank 0."""
    threads: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    """CPU threads of a rank. Default: the cores divided among the ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks. `auto`: GPUs if there are any."""
    gpus: list[Whole] = []
    """Indices of the GPUs that the ranks may use, as numbered by the driver. Default: all, or
    those that a scheduler has assigned by CUDA_VISIBLE_DEVICES."""
    max_restarts: Whole = 3
    """How many times the ranks are restarted from the last checkpoint after one of them died."""
    silence: Seconds = 1800.0
    """Seconds without a message after which a rank counts as hung and is killed and restarted.
    Applies from the first step of a rank."""
    load_silence: Seconds = 1800.0
    """The same before the first step; downloading or reading large files sends no messages."""
    preempted_exit: Annotated[int, Meta(ge=0, le=125)] = 0
    """Exit code of a run that SIGTERM, SIGUSR1 or `train.save_before_deadline` has stopped before
    its end, so that a scheduler's script can tell it from one that is done. 75 (EX_TEMPFAIL) is
    customary; 1 to 4 have other meanings and are refused."""
    nice: Annotated[int, Meta(ge=0, le=19)] = 5
    """Niceness of ranks on a CPU, which keeps the machine responsive; 0 is normal priority."""

    @property
    def fewest_nodes(self) -> int:
        """Machines without which the run waits."""
        return self.nodes if self.min_nodes is None else self.min_nodes


class ParallelConfig(Section, frozen=True):
    """Distribution of the models over ranks, and options that save memory."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """`ddp` replicates the policy on each rank, `fsdp` shards it (FSDP2); `auto` shards it if it
    would not fit otherwise. No effect with one rank."""
    frozen: Literal["keep", "offload"] = "keep"
    """Reference and reward models: `keep` holds them on the device, sharded if the policy is;
    `offload` holds them in host memory and moves them to the device while they are used. On a CPU,
    unsharded ones are always memory-mapped from a file."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: much less memory, and
    about a third more arithmetic in the updates."""
    activations: Literal["keep", "offload"] = "keep"
    """What `activation_checkpointing` still stores, the input of each layer: `keep` holds it on the
    device, `offload` in host memory until the backward pass. Saves 4 bytes for each token of a
    micro-batch, layer and element of the hidden states. No effect on a CPU."""
