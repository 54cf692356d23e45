"""What the engine would call of vLLM on GPUs, beyond what it calls on a CPU. NOT IN USE.

None of this has ever run: there was no GPU to run it on, and sleep mode, CUDA IPC and NCCL do not
exist on a CPU. `rollout.engine: vllm` does not call it; on GPUs, too, weights go through shared
memory. It states, in one place, which of vLLM's interfaces a faster path needs, and
tests/vllm compares the names and arguments with those of the installed vLLM, so that a release
which changes them is noticed. A green test says that the calls are possible, not that they work.

With the engine on the trainer's GPUs, a step would be: :func:`wake_for_weights`,
:func:`update_by_ipc`, :func:`wake_for_rollouts`, generate, :func:`sleep`. On GPUs of its own:
:func:`join_nccl` once, then `update_weights` with names and shapes while rank 0 broadcasts.
"""

from typing import Any

WEIGHTS, CACHE = "weights", "kv_cache"
"""vLLM's tags of the memory that :func:`sleep` gives up."""


def sleep(llm: Any) -> None:
    """Gives up the memory of weights and cache; the weights are not kept: they are sent anew."""
    llm.sleep(level=2)


def wake_for_weights(llm: Any) -> None:
    """Allocates the weights again, with undefined content."""
    llm.wake_up(tags=[WEIGHTS])


def wake_for_rollouts(llm: Any) -> None:
    """Allocates the cache again. Between the two, the trainer needs no room for gradients."""
    llm.wake_up(tags=[CACHE])


def ipc_update(
    names: list[str],
    dtypes: list[str],
    shapes: list[list[int]],
    handles: list[dict[str, tuple[Any, ...]]],
) -> dict[str, Any]:
    """The argument of `update_weights` for CUDA IPC.

    Args:
        names: of the weights, in order.
        dtypes: as `bfloat16`.
        shapes: of the weights.
        handles: for each weight, the GPU's UUID → the arguments of
            `torch.multiprocessing.reductions.rebuild_cuda_tensor`. They are only safe to receive on
            the socket whose peer is checked.
    """
    return {"names": names, "dtype_names": dtypes, "shapes": shapes, "ipc_handles": handles}


def update_by_ipc(llm: Any, update: dict[str, Any]) -> None:
    """Loads weights of :func:`ipc_update` in all workers; empties the prefix cache."""
    llm.collective_rpc("start_weight_update")
    llm.collective_rpc("update_weights", args=(update,))
    llm.collective_rpc("finish_weight_update")
    llm.reset_prefix_cache()


def join_nccl(llm: Any, address: str, port: int, workers: int) -> None:
    """Joins the workers to a group of NCCL whose rank 0 is the trainer's.

    Args:
        llm: the engine, made with `weight_transfer_config={"backend": "nccl"}`.
        address: of the trainer.
        port: free, at the trainer.
        workers: number of the engine's workers.
    """
    info = {
        "master_address": address, "master_port": port, "rank_offset": 1,
        "world_size": workers + 1,
    }  # fmt: skip
    llm.collective_rpc("init_weight_transfer_engine", args=(info,))
