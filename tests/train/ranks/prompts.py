"""Loads prompts as one of two ranks: ``prompts.py FOLDER DATA FAR``.

FOLDER is for the store, the caches and the results. With FAR=1 rank 1 is as on another machine,
where nothing of rank 0's cache is seen.
"""

import json
import os
import sys
from pathlib import Path

from transformers import AutoTokenizer

from engine import starter
from engine.config.sections.launch import LaunchConfig
from engine.config.sections.model import DataConfig
from engine.launch.environment import STORE_VARIABLE
from engine.train.data import load_prompts
from engine.train.data.prompt_cache import PromptCache
from engine.train.distributed import share_prompts
from engine.train.distributed.ranks import RankGroup


def main():
    folder, data, far = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"
    os.environ[STORE_VARIABLE] = f"file:{folder}/store"
    ranks = RankGroup(LaunchConfig(device="cpu"))
    load_prompts.CACHED_BYTES = 0
    share_prompts.PART = 1000
    cache = folder / (f"cache-{ranks.rank}" if far else "cache")
    if far and not ranks.is_lead:
        os.environ["LOCAL_RANK"] = "0"
        find = PromptCache.find
        PromptCache.find = lambda self, name: find(self, name) if self.folder == cache else None
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    prompts = share_prompts.load_on_all_ranks(
        DataConfig(prompts=data, cache=str(cache), max_prompt_tokens=7), tokenizer, ranks,
        per_step=4, seed=1,
    )  # fmt: skip
    found = [[p.ids, p.text] for s in range(1, 9) for p in prompts.for_step(s)]
    result = {"prompts": found, "rows": any(p.row for p in prompts.first(3)),
              "left_out": prompts.left_out}  # fmt: skip
    (folder / f"{ranks.rank}.json").write_text(json.dumps(result))
    ranks.final_barrier()
    os._exit(0)  # like a rank


if __name__ == "__main__":
    main()
