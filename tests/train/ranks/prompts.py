"""Loads prompts as one of two ranks: ``prompts.py FOLDER DATA``.

FOLDER is for the caches and the results. The second time rank 1 is as on another
machine, where nothing of rank 0's cache is seen.
"""

import json
import os
import sys
from pathlib import Path

from transformers import AutoTokenizer

from engine import starter
from engine.config.sections.launch import LaunchConfig
from engine.config.sections.model import DataConfig
from engine.train.data import load_prompts
from engine.train.data.prompt_cache import PromptCache
from engine.train.distributed import share_prompts
from engine.train.distributed.ranks import RankGroup


def main():
    folder, data = Path(sys.argv[1]), sys.argv[2]
    ranks = RankGroup(LaunchConfig(device="cpu"))
    load_prompts.CACHED_BYTES = 0
    share_prompts.PART_BYTES = 1000
    results = [load(data, folder / "shared", ranks)]
    cache = folder / f"of-{ranks.rank}"
    if not ranks.is_lead:
        os.environ["LOCAL_RANK"] = "0"
        find = PromptCache.find
        PromptCache.find = lambda self, name: find(self, name) if self.folder == cache else None
    results.append(load(data, cache, ranks))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(results))
    ranks.final_barrier()
    os._exit(0)  # like a rank


def load(data, cache, ranks):
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    config = DataConfig(prompts=data, cache=str(cache), max_prompt_tokens=7)
    prompts = share_prompts.load_on_all_ranks(config, tokenizer, ranks, per_step=4, seed=1)
    return {
        "prompts": [[p.ids, p.text] for s in range(1, 9) for p in prompts.for_step(s)],
        "rows": any(p.row for p in prompts.first(3)),
        "left_out": prompts.left_out,
    }


if __name__ == "__main__":
    main()
