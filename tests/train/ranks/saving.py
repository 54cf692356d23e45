"""One of several ranks that save and load a tiny policy, for test_shards.py.

``saving.py save STRATEGY FOLDER [TROUBLE]`` trains one step, and trains on while the checkpoint is
written; ``saving.py load STRATEGY FOLDER...`` reads some into other weights. Each rank leaves what
it met in FOLDER as JSON, rank 0 the tensors, gathered, as safetensors.
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
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engine import starter
from engine.config import file as config_file
from engine.config.settings import initial_settings
from engine.errors import CheckpointError
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints import saver, shards
from engine.train.checkpoints.folder import TrainingState
from engine.train.checkpoints.saver import Saver
from engine.train.models.language_model import LanguageModel


def rank() -> int:
    """This one's."""
    return int(os.environ.get("RANK", "0"))


def make_policy(strategy: str, seed: int) -> LanguageModel:
    """A policy of 30 000 parameters, tied, with a value trunk; odd sizes split unevenly."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=101, hidden_size=36, intermediate_size=50, num_hidden_layers=2,
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


def make_optimiser(policy: LanguageModel) -> torch.optim.Optimizer:
    """Like the engine's."""
    return torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=True)


def train(policy: LanguageModel, optimiser: torch.optim.Optimizer, strategy: str) -> None:
    """One step on the same tokens everywhere: every strategy ends at the same weights."""
    tokens = torch.arange(24).reshape(2, 12)
    entered = DistributedDataParallel(policy) if strategy == "ddp" else policy
    logits, values = entered(tokens, torch.ones_like(tokens), 12)
    (logits.logsumexp(-1).mean() + (values - 1).square().mean()).backward()
    optimiser.step()
    optimiser.zero_grad()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gathered and copied."""
    return {
        k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone().contiguous()
        for k, t in sorted(tensors.items())
    }


def break_on(which: int) -> None:
    """The disk of one rank is full, in the midst of the shards."""

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank() == which:
        shards.save_file = full  # type: ignore[assignment]


def save(group: Any, strategy: str, folder: Path, trouble: str) -> Any:
    """Trains, saves, and trains on meanwhile."""
    policy = make_policy(strategy, seed=1)
    optimiser = make_optimiser(policy)
    train(policy, optimiser, strategy)
    tensors = whole(shards.training_tensors(policy, optimiser))
    lm = whole(dict(policy.lm.named_parameters()))
    if rank() == 0:
        save_file(tensors | {f"lm/{k}": t for k, t in lm.items()}, folder / "expected.safetensors")
    if strategy == "fsdp":  # as a rollout leaves it: with parameters gathered
        policy.unshard()
        with torch.no_grad():
            policy(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64), 3)
    if trouble == "full":
        break_on(1)
    concluded = []
    saving = Saver(folder / "checkpoints", group, lambda *args: concluded.append(args))
    settings = initial_settings(config_file.load(starter.FOLDER / "demo.yaml", []))
    state = TrainingState(step=7, sampling_seed=1, settings=settings)
    tokenizer = AutoTokenizer.from_pretrained(starter.FOLDER / "policy")
    if trouble == "crash" and rank() == 0:
        checkpoint_folder.publish = lambda *_args: os._exit(9)  # type: ignore[assignment]
    saving.begin(state, policy, tokenizer, optimiser, score=1.5, kl=0.5)
    state.step = 8
    train(policy, optimiser, strategy)
    outcome = saving.wait()
    if isinstance(outcome, CheckpointError):
        return {"error": str(outcome), "concluded": len(concluded)}
    assert isinstance(outcome, saver.Saved)
    if rank() == 0:
        checkpoint_folder.complete(outcome.folder)
    return {"size": outcome.size, "folder": str(outcome.folder), "concluded": len(concluded)}


def load(group: Any, strategy: str, folder: Path) -> Any:
    """Loads into a policy of other weights."""
    policy = make_policy(strategy, seed=2)
    optimiser = make_optimiser(policy)
    saved = checkpoint_folder.folder_of(folder / "checkpoints", 7)
    state = checkpoint_folder.read_state(saved, verify=rank() == 0)
    shards.load_training(saved, policy, optimiser, group)
    tensors = whole(shards.training_tensors(policy, optimiser))
    if rank() == 0:
        save_file(tensors, folder / f"read-by-{strategy}.safetensors")
    return {"step": state.step}


def main() -> None:
    """One rank."""
    act, strategy, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    group = None
    if strategy != "alone":
        store, number, count = next(rendezvous("env://"))
        dist.init_process_group("gloo", store=store, rank=number, world_size=count)
        group = dist.new_group(backend="gloo")
    if act == "save":
        folder, trouble = Path(rest[0]), rest[1] if len(rest) > 1 else ""
        seen = save(group, strategy, folder, trouble)
        (folder / f"save-{rank()}.json").write_text(json.dumps(seen))
    else:
        for folder in map(Path, rest):
            seen = load(group, strategy, folder)
            (folder / f"load-{rank()}.json").write_text(json.dumps(seen))
    if group is not None:
        # As a rank does: one that ends in the midst of a barrier is a loss to the others.
        store.set(f"parting/{rank()}", "1")
        store.wait([f"parting/{r}" for r in range(dist.get_world_size())])
        os._exit(0)  # as a rank does: groups that are taken down abort it now and then


main()
