"""On a GPU a run is saved and resumed, and a reward model is trained."""

import math

import pytest
import torch
from msgspec.structs import replace
from transformers import PreTrainedModel

from engine.config.sections.reward_training import RewardTrainingConfig
from engine.protocol.rank_messages import Begin
from engine.train.checkpoints.host_copy import HostCopies
from engine.train.distributed.ranks import RankGroup
from engine.train.load import load_run
from engine.train.reward_training import train
from engine.train.step import train_step
from tests.train.checkpoints import save_checkpoint
from tests.train.gpu.pretend import GPU, pretend_gpu
from tests.train.gpu.test_variants import SMALLEST
from tests.train.test_reward_training import request
from tests.variants import some_of


def rank_on_gpu(launch):
    ranks = RankGroup(replace(launch, device="cpu"))
    ranks.device = GPU
    return ranks


@pytest.mark.parametrize(
    "overrides",
    some_of(
        {
            "separate value trunk, 8-bit moments": [
                "model.value=separate", "train.optimiser=adamw_8bit",
            ],
            "averaged policy, a reference that follows": [
                "train.ema.decay=0.5", "kl.reference_update={every: 1, mix: 0.5}",
            ],
            "LoRA in bfloat16, frozen models on the host": [
                "lora.rank=2", "model.dtype=bfloat16", "parallel.frozen=offload",
            ],
        },
        "separate value trunk, 8-bit moments",
    ),
)  # fmt: skip
def test_a_run_that_is_saved_on_a_gpu_resumes_bit_for_bit(
    make_run, tiny_model, few_prompts, overrides
):
    keys = [*SMALLEST, f"model.policy={tiny_model}", f"data.prompts={few_prompts}", *overrides]
    with pretend_gpu():
        run, session = make_run(*keys, device=GPU)
        train_step(run, 1)
        run.state.step = 1
        save_checkpoint(run, session)
        ranks, begin = rank_on_gpu(run.config.launch), Begin(attempt=2, from_step=1)
        again = load_run(session, run.config, begin, ranks)
        ours, theirs = (train_step(each, 2)[0] for each in (run, again))
    for name, number in ours.items():
        if not name.startswith(("time/", "perf/")):
            assert theirs[name] == number, name


def test_a_reward_model_is_trained_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RankGroup", rank_on_gpu)
    # It asks for the memory of the weights, which those of a pretended GPU do not have.
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_: None)
    settings = RewardTrainingConfig(epochs=2, learning_rate=3e-4)
    with pretend_gpu():
        result = train.train_reward(
            request(tmp_path / "out", settings=settings), lambda _line: None
        )
    assert result.device == "cuda:0"
    assert result.best_epoch and all(math.isfinite(x) for both in result.losses for x in both)


def test_weights_are_copied_to_pinned_memory_once_it_is_there(monkeypatch, caplog):
    pinned = []
    allocate = torch.empty

    def counted(*shape, pin_memory=False, **named):
        pinned.append(pin_memory)
        if pin_memory and len(pinned) == 3:  # a container's limit on locked memory
            raise RuntimeError("CUDA error: out of memory")
        return allocate(*shape, **named)

    monkeypatch.setattr(torch, "empty", counted)
    with pretend_gpu():
        one, two = torch.ones(2, 3, device=GPU), torch.ones(4, device=GPU)
        copies = HostCopies()
        first = copies.copy({"one": one, "two": two})
        assert [type(x) for x in first.values()] == [torch.Tensor] * 2
        one += 1
        second = copies.copy({"one": one, "two": two})
        assert second["one"] is first["one"] and second["one"].tolist() == [[2.0] * 3] * 2
        assert pinned == [True, True]
        third = copies.copy({"one": one, "two": torch.ones(5, device=GPU)})
        assert third["two"].tolist() == [1.0] * 5
        copies.copy({"three": one})
    assert pinned == [True, True, True, False, False]
    assert caplog.text.count("pageable memory") == 1
