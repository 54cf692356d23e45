"""Gradients under FSDP2, in a process group of one rank."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from engine.config.sections.launch import LaunchConfig
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import _shard, materialised, synchronised


@pytest.fixture
def ranks(tmp_path):
    single = RankGroup(LaunchConfig(device="cpu"))  # before init_process_group, which it would see
    store = dist.FileStore(str(tmp_path / "ranks"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield single
    dist.destroy_process_group()


def accumulated(ranks, compute):
    """A weight's gradient after two micro-batches with gradients 256 and 1."""
    model = nn.Linear(1, 1, bias=False)
    _shard(model, ranks, compute)
    for k, gradient in enumerate((256.0, 1.0)):
        with synchronised(model, last=k == 1):
            model(torch.full((1, 1), gradient)).sum().backward()
        if k == 0:
            assert isinstance(model.weight, DTensor)
            assert model.weight.grad is not None, "unsharded gradients are kept on every rank"
    return float(model.weight.grad.full_tensor())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_gradients_of_micro_batches_add_up_in_float32(ranks, compute):
    assert accumulated(ranks, compute) == 257.0


def test_gradients_are_summed_over_ranks_in_float32(ranks):
    model = nn.Linear(1, 1, bias=False)
    _shard(model, ranks, torch.bfloat16)
    model(torch.ones(1, 1))
    assert model._get_fsdp_state()._fsdp_param_group._reduce_dtype is torch.float32


def test_gathering_part_of_a_sharded_model_does_not_change_its_root(ranks):
    model = nn.Sequential(nn.Linear(1, 1))
    _shard(model, ranks, torch.float32)
    with materialised(SimpleNamespace(modules=model.modules)):
        assert not isinstance(model[0].weight, DTensor)
    assert isinstance(model[0].weight, DTensor)
    assert not model._get_fsdp_state()._fsdp_param_group._reshard_after_forward
