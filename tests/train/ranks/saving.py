"""A rank that saves or loads a tiny policy, for test_shards.py.

``save STRATEGY FOLDER [FAULT|AdamW8bit]`` trains one step, starts a save, and trains another step
while the checkpoint is written. ``load STRATEGY FOLDER...`` loads checkpoints into a policy with
different weights. Several of these, separated by ``--``, run one after the other, since starting
processes takes longer than the work. Each rank writes its result to FOLDER as JSON; rank 0 also
writes the gathered tensors as safetensors.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engine import starter
from engine.config import file as config_file
from engine.config.sections.train import EMAConfig
from engine.config.settings import settings_of
from engine.errors import CheckpointError
from engine.launch.environment import STORE_VARIABLE
from engine.session.checkpoints import checkpoint_path, mark_complete
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints import saver, shards
from engine.train.checkpoints.folder import SavedState
from engine.train.checkpoints.saver import SavedMetrics, SavedModels, Saver
from engine.train.models.language_model import LanguageModel
from engine.train.policy_average import PolicyAverage
from engine.train.ppo.adamw_8bit import AdamW8bit

EIGHT = "AdamW8bit"


def rank() -> int:
    """The rank of this process."""
    return int(os.environ.get("RANK", "0"))


def make_policy(strategy: str, seed: int, kind: str) -> LanguageModel:
    """A policy of 30,000 parameters with tied weights and a value trunk; its sizes are odd.

    For 8-bit moments its rows can be divided into blocks; the vocabulary is still odd.
    """
    torch.manual_seed(seed)
    hidden, inner = (48, 144) if kind == EIGHT else (36, 50)
    config = LlamaConfig(
        vocab_size=101, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    policy = LanguageModel(LlamaForCausalLM(config), "separate")
    policy.value_trunk = AutoModel.from_config(config)
    if strategy == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in policy.lm.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
    return policy


def make_optimiser(policy: LanguageModel, kind: str) -> torch.optim.Optimizer:
    """An optimiser like that of the engine."""
    if kind == EIGHT:
        return AdamW8bit(
            policy.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0
        )
    return torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=True)


def train(policy: LanguageModel, optimiser: torch.optim.Optimizer, strategy: str) -> None:
    """One step on the same tokens on all ranks, so that all strategies give the same weights."""
    tokens = torch.arange(24).reshape(2, 12)
    module = DistributedDataParallel(policy) if strategy == "ddp" else policy
    logits, values, _ = module(tokens, torch.ones_like(tokens), 12)
    (logits.logsumexp(-1).mean() + (values - 1).square().mean()).backward()
    optimiser.step()
    optimiser.zero_grad()


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gathers DTensors and copies all tensors, sorted by name."""
    return {
        k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone().contiguous()
        for k, t in sorted(tensors.items())
    }


def fill_disk_of(number: int) -> None:
    """Makes one rank fail with a full disk when it writes its shards."""

    def no_space(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank() == number:
        shards.save_file = no_space  # type: ignore[assignment]  # raises always


def save(group: Any, strategy: str, folder: Path, fault: str) -> Any:
    """Trains a step, starts a save, trains another step, and waits for the save.

    `fault` may also be the kind of the optimiser.
    """
    policy = make_policy(strategy, 1, fault)
    optimiser = make_optimiser(policy, fault)
    average = PolicyAverage(policy, EMAConfig(decay=0.75))
    train(policy, optimiser, strategy)
    average.update(policy)
    tensors = gathered(shards.training_tensors(policy, optimiser))
    lm = gathered(dict(policy.lm.named_parameters()))
    if rank() == 0:
        save_file(tensors | {f"lm/{k}": t for k, t in lm.items()}, folder / "expected.safetensors")
    averaged = gathered(average.tensors(policy))
    if rank() == 0:
        save_file(averaged, folder / "average.safetensors")
    if strategy == "fsdp":  # with gathered parameters, as after a rollout
        policy.unshard()
        with torch.no_grad():
            policy(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64), 3)
    if fault == "full":
        fill_disk_of(1)
    concluded = []
    saving = Saver(folder / "checkpoints", group, lambda *args: concluded.append(args))
    settings = settings_of(config_file.load(starter.FOLDER / "demo.yaml", []))
    state = SavedState(step=7, sampling_seed=1, settings=settings)
    tokenizer = AutoTokenizer.from_pretrained(starter.FOLDER / "policy")
    if fault == "crash" and rank() == 0:
        checkpoint_folder.publish = lambda *_args: os._exit(9)  # type: ignore[assignment]
    models = SavedModels(policy, tokenizer, optimiser, average=average.tensors(policy))
    saving.begin(state, models, SavedMetrics(1.5, 0.5))
    state.step = 8
    train(policy, optimiser, strategy)
    average.update(policy)
    outcome = saving.wait()
    if isinstance(outcome, CheckpointError):
        return {"error": str(outcome), "concluded": len(concluded)}
    assert isinstance(outcome, saver.Saved)
    if rank() == 0:
        mark_complete(outcome.folder)
    return {"size": outcome.size, "folder": str(outcome.folder), "concluded": len(concluded)}


def load(group: Any, strategy: str, folder: Path) -> Any:
    """Loads a checkpoint into a policy with different weights."""
    saved = checkpoint_path(folder / "checkpoints", 7)
    kind = checkpoint_folder.read_optimiser(saved)
    policy = make_policy(strategy, 2, kind)
    optimiser = make_optimiser(policy, kind)
    state = checkpoint_folder.read_state(saved)
    assert shards.load_training(saved, policy, optimiser, group)
    average = PolicyAverage(policy, EMAConfig(decay=0.75))
    shards.load_average(saved, average.tensors(policy), group)
    tensors = gathered(shards.training_tensors(policy, optimiser))
    tensors |= {f"ema/{k}": t for k, t in gathered(average.tensors(policy)).items()}
    if rank() == 0:
        save_file(tensors, folder / f"read-by-{strategy}.safetensors")
    return {"step": state.step}


def act(group: Any, action: str, strategy: str, *rest: str) -> None:
    """Carries out one of the actions of the command line."""
    if action == "save":
        folder, fault = Path(rest[0]), rest[1] if len(rest) > 1 else ""
        result = save(group, strategy, folder, fault)
        (folder / f"save-{rank()}.json").write_text(json.dumps(result))
        return
    for folder in map(Path, rest):
        result = load(group, strategy, folder)
        (folder / f"load-{rank()}.json").write_text(json.dumps(result))


def refuse_pickles() -> None:
    """Makes torch's collectives on objects, which send pickles, raise an error."""

    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a pickle would be sent to another rank")

    for name in (
        "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
        "send_object_list", "recv_object_list",
    ):  # fmt: skip
        assert hasattr(dist, name), f"torch has renamed {name}"
        setattr(dist, name, refuse)


def main() -> None:
    """Runs one rank."""
    actions: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            actions.append([])
        else:
            actions[-1].append(word)
    refuse_pickles()
    group = None
    if actions[0][1] != "single":
        count = int(os.environ["WORLD_SIZE"])
        store = dist.FileStore(os.environ[STORE_VARIABLE].partition(":")[2], count)
        dist.init_process_group("gloo", store=store, rank=rank(), world_size=count)
        group = dist.new_group(backend="gloo")
    for action in actions:
        act(group, *action)
    if group is not None:
        # Like RankGroup.final_barrier: others would report a rank that exits early as lost.
        store.set(f"parting/{rank()}", "1")
        store.wait([f"parting/{r}" for r in range(dist.get_world_size())])
        os._exit(0)  # like a rank: destroying the process groups sometimes aborts the process


main()
