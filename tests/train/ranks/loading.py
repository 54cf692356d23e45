"""Loads a model and measures the memory that this takes.

With several ranks it is sharded, unless it is frozen: that is replicated, mapped from a file.

``loading.py FOLDER ADAPTERS RESULTS``: FOLDER holds the model, ADAPTERS some for it. Each rank
writes a JSON file per load to RESULTS: the bytes of its weights, the growth of its resident memory
at the peak of the load, and, on rank 0, the tensors that differ from those that transformers loads,
or that peft merges.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from engine.config.sections.launch import LaunchConfig
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import full_tensor, local_tensor, place_model
from engine.train.distributed.stored_tensor import mark_stored, stored_of
from engine.train.models.language_model import LanguageModel, fingerprint
from engine.train.models.pretrained import load_lm
from engine.train.models.read_pretrained import read_pretrained


def main():
    folder, adapters, results = sys.argv[1:]
    ranks = RankGroup(LaunchConfig(device="cpu"))
    for name, source, dtype, kind in (
        ("warm-up", adapters, torch.float32, "every rank"),  # imports what a load needs
        ("every-rank", folder, torch.float32, "every rank"),
        ("bfloat16", folder, torch.bfloat16, "every rank"),
        ("rank-0", folder, torch.float32, "rank 0"),
        ("adapters", adapters, torch.float32, "every rank"),
        ("adapters-bfloat16", adapters, torch.bfloat16, "every rank"),
        ("adapters-rank-0", adapters, torch.float32, "rank 0"),
        ("frozen", folder, torch.float32, "frozen"),
        ("frozen-adapters-bfloat16", adapters, torch.bfloat16, "frozen"),
    ):
        result = load(source, ranks, dtype, kind)
        (Path(results) / f"{name}-{ranks.rank}.json").write_text(json.dumps(result))
    ranks.final_barrier()
    os._exit(0)  # like a rank


def load(folder, ranks, dtype, kind):
    """Loads a model; `kind` is `frozen`, or which ranks read the files of a sharded one."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the load before has freed would hide a growth
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    frozen = kind == "frozen"
    lm = load_lm(folder, "model.policy", ranks, dtype, sharded=ranks.size > 1 and not frozen)
    model = LanguageModel(lm)
    if frozen:
        place_model(model.requires_grad_(False), ranks, "ddp", frozen=True)
        growth = memory("VmHWM") - before  # the fingerprint reads all of it
        mark = fingerprint(model)
    else:
        for parameter in lm.parameters():
            stored = replace(stored_of(parameter), on_every_rank=kind == "every rank")
            mark_stored(parameter, stored)
        place_model(model, ranks, "fsdp")
        mark = fingerprint(model)
        growth = memory("VmHWM") - before
    share = sum(local_tensor(p).nbytes for p in model.parameters())
    tensors = {n: full_tensor(t).detach() for n, t in model.lm.state_dict().items()}
    tensors |= dict(model.lm.named_buffers())
    different = []
    if ranks.is_lead:
        if (Path(folder) / "config.json").exists():
            whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        else:
            whole = read_pretrained(AutoModelForCausalLM, folder, "model.policy", dtype=dtype)
        wanted = whole.state_dict() | dict(whole.named_buffers())
        same = {n for n in wanted if n in tensors and torch.equal(wanted[n], tensors[n])}
        different = sorted(wanted.keys() ^ tensors.keys() | wanted.keys() - same)
        if mark != fingerprint(LanguageModel(whole)):
            different.append("fingerprint")
    return {"share": share, "growth": growth, "different": different}


def memory(key):
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


if __name__ == "__main__":
    main()
