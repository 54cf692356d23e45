"""Write one-sentence reviews with SmolLM2-135M-Instruct, read offline from a GGUF file.

All sequences of a batch share one request, so its key/value cache is computed once and
repeated; only the openings differ, and those are forced token by token.  That makes the
long few-shot request nearly free and needs no padding.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import time
from collections.abc import Iterator, Sequence
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig

from engine.train.models.language_model import cache_name

from .openings import FILM_OPENINGS, PRODUCT_OPENINGS
from .recipes import DOMAINS, EXAMPLES, FREE_STARTS, KINDS, SENTIMENT_WEIGHTS, Domain, Request

MIN_WORDS, MAX_WORDS = 5, 22
SHOTS = 4
FREE_START_SHARE = 0.15
TOP_K = 64
Record = dict[str, str]  # of a sentence: its batch, domain, sentiment and text

_ALLOWED = re.compile(r"[A-Za-z ,.!?'-]+")
_BANNED = re.compile(
    r"\b(reviewer|review|reviews|negative|positive|language model|sentence|someone who thinks)\b",
    re.IGNORECASE,
)
_OPENINGS: dict[Domain, tuple[str, ...]] = {"film": FILM_OPENINGS, "product": PRODUCT_OPENINGS}
_KNOWN = {s for by_tone in EXAMPLES.values() for bank in by_tone.values() for s in bank}


def acceptable(text: str) -> bool:
    """Tell whether a sentence is one clean, ended, low-entropy sentence.

    Digits and names (capitals inside the sentence) are refused: a policy of a few million
    parameters cannot learn them, and they only raise its loss.
    """
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or text in _KNOWN:
        return False
    if text[-1] not in ".!?" or not text[0].isupper() or not _ALLOWED.fullmatch(text):
        return False
    if any(c in text[:-1] for c in ".!?") or _BANNED.search(text):
        return False
    for word in words[1:]:
        if word[0].isupper() and word.strip(",.!?") not in {"I", "I'm", "I've", "I'd", "I'll"}:
            return False
    plain = [w.strip(",.!?").lower() for w in words]
    if any(a == b for a, b in pairwise(plain)):
        return False
    long_words = [w for w in plain if len(w) > 3]
    # "unclear and unclear": the writer's own loops must not be taught to the policy.
    return len(long_words) - len(set(long_words)) <= 1 and len(set(plain)) >= 0.75 * len(plain)


class Writer:
    """SmolLM2 in bfloat16 with a decode loop that forces each row's opening."""

    def __init__(self, gguf: Path, temperature: float = 0.75, top_p: float = 0.92) -> None:
        folder, name = str(gguf.parent), gguf.name
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        # dequantize: the packed kernels compute in float32 and are slower than bfloat16 here.
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        ).eval()
        self.temperature, self.top_p = temperature, top_p
        vocab: dict[str, int] = self.tokenizer.get_vocab()
        ends = {i for s, i in vocab.items() if s in {".", "!", "?"} or s.startswith("Ċ")}
        self.stop = ends | {self.tokenizer.eos_token_id, vocab["<|endoftext|>"]}

    @torch.inference_mode()
    def write(self, request: Request, openings: Sequence[str], max_tokens: int = 32) -> list[str]:
        """Return one sentence per opening; ``max_tokens`` counts the opening's tokens too."""
        prompt = self.tokenizer.apply_chat_template(
            request.messages(), tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        forced = [self.tokenizer(o, add_special_tokens=False).input_ids for o in openings]
        cache = DynamicCache(config=self.model.config)
        cached = {cache_name(signature(self.model.forward).parameters): cache, "use_cache": True}
        out = self.model(ids, logits_to_keep=1, **cached)
        cache.batch_repeat_interleave(len(openings))
        logits = out.logits[:, -1].expand(len(openings), -1)  # [rows, vocabulary]
        rows = list(range(len(openings)))
        written: list[list[int]] = [[] for _ in openings]
        for step in range(max_tokens):
            tokens = self._sample(logits)
            for k, row in enumerate(rows):
                if step < len(forced[row]):
                    tokens[k] = forced[row][step]
                written[row].append(int(tokens[k]))
            keep = [
                k
                for k, row in enumerate(rows)
                if step < len(forced[row]) or written[row][-1] not in self.stop
            ]
            if not keep:
                break
            if len(keep) < len(rows):
                index = torch.tensor(keep)
                cache.batch_select_indices(index)
                tokens, rows = tokens[index], [rows[k] for k in keep]
            step_out = self.model(tokens[:, None], **cached)
            logits = step_out.logits[:, -1]
        return [self.tokenizer.decode(w, skip_special_tokens=True).strip() for w in written]

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Nucleus sampling within the ``TOP_K`` best tokens; returns ids, shape [rows]."""
        probs, ids = (logits.float() / self.temperature).softmax(-1).topk(TOP_K)
        probs = probs.masked_fill(probs.cumsum(-1) - probs > self.top_p, 0.0)
        return ids.gather(1, torch.multinomial(probs, 1))[:, 0]


def _draw_request(rng: random.Random, domain: Domain) -> Request:
    sentiment = rng.choices(list(SENTIMENT_WEIGHTS), list(SENTIMENT_WEIGHTS.values()))[0]
    examples = tuple(rng.sample(EXAMPLES[domain][sentiment], SHOTS))
    return Request(domain, sentiment, rng.choice(KINDS[domain]), examples)


def _write_file(gguf: str, out: str, target: int, seed: int) -> None:
    torch.set_num_threads(1)
    for progress in write_sentences(Path(gguf), Path(out), target, seed=seed):
        print(f"writer {seed}: {progress}", flush=True)


def write_in_processes(gguf: Path, folder: Path, target: int, processes: int, seed: int) -> None:
    """Fill ``synthetic-<process>.jsonl`` files with ``target`` sentences between them.

    One single-threaded process per core: the decode steps are small, and threads that wait
    for each other at every one of them lose much of the machine when it is shared.
    """
    context = multiprocessing.get_context("spawn")
    share = -(-target // processes)
    workers = []
    for number in range(processes):
        out = str(folder / f"synthetic-{number}.jsonl")
        worker = context.Process(target=_write_file, args=(str(gguf), out, share, seed + number))
        worker.start()
        workers.append(worker)
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"A writer stopped with code {worker.exitcode}.")


def read_sentences(folder: Path) -> list[Record]:
    """Return the records of all processes without duplicate texts, in a fixed order."""
    by_text: dict[str, Record] = {}
    for path in sorted(folder.glob("synthetic-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            by_text.setdefault(record["text"], record)
    return list(by_text.values())


def write_sentences(
    gguf: Path, out: Path, target: int, batch: int = 128, seed: int = 0
) -> Iterator[str]:
    """Append sentences to the JSON Lines file ``out`` until it holds ``target``; yield progress.

    Each line is ``{"batch", "domain", "sentiment", "text"}``.  Batch *b* has its own seed, so
    an interrupted run goes on where it stopped; the file is flushed after every batch.
    """
    records = [json.loads(x) for x in out.read_text().splitlines()] if out.exists() else []
    seen = {r["text"] for r in records}
    b = max((r["batch"] for r in records), default=-1) + 1
    writer = Writer(gguf)
    start, first = time.monotonic(), len(seen)
    with out.open("a") as file:
        while len(seen) < target:
            rng = random.Random(f"{seed}-{b}")
            torch.manual_seed(seed * 1_000_003 + b)
            domain = DOMAINS[b % len(DOMAINS)]
            request = _draw_request(rng, domain)
            openings = rng.sample(_OPENINGS[domain], batch)
            for k in range(batch):
                if rng.random() < FREE_START_SHARE:
                    openings[k] = rng.choice(FREE_STARTS)
            for text in writer.write(request, openings):
                if text in seen or not acceptable(text):
                    continue
                seen.add(text)
                record = {"batch": b, "domain": domain, "sentiment": request.sentiment}
                file.write(json.dumps({**record, "text": text}) + "\n")
            file.flush()
            b += 1
            rate = (len(seen) - first) / (time.monotonic() - start)
            yield f"batch {b}: {len(seen)} sentences kept, {rate:.1f}/s"
