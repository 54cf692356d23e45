"""Rollouts of one shape by vLLM, by the native loop and by transformers' `generate`.

``python -m benchmarks.rollouts [--shape smollm2|starter] [--rows N] [--tokens N]``

Needs vLLM (make vllm). Weights are random; no response ends early. Prints seconds for a weight
update and tokens a second, the best of the repetitions.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from engine import starter
from engine.config import file as config_file
from engine.launch.parent_death import PARENT_VARIABLE
from engine.launch.rollout.engine import rollout_command, rollout_environment, shared_folder
from engine.memory.rollout_engine import cache_bytes
from engine.protocol import frames, sockets
from engine.protocol.frames import Message
from engine.protocol.rollout.messages import (
    Generate,
    LoadWeights,
    NextTurn,
    NextTurns,
    Progress,
    Start,
    decode_from_engine,
)
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.models.language_model import LanguageModel
from engine.train.rollout.native.backend import generate
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.stop_criteria import StopCriteria
from tests.train.weights_file import write_weights

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    max_position_embeddings=2048,
)  # fmt: skip
PROMPT = 16
"""Tokens of each prompt."""


class NoText(PreTrainedTokenizerBase):
    """Takes the place of a tokenizer."""

    def decode(self, *_args: Any, **_options: Any) -> str:
        """No text."""
        return ""


class Engine:
    """An engine's process, as its supervisor and rank 0 have it."""

    def __init__(self, folder: Path, start: Start) -> None:
        config = config_file.load(
            starter.FOLDER / "demo.yaml", ["rollout.engine=vllm", "launch.device=cpu"]
        )
        listener, path = sockets.listen(folder, sockets.ROLLOUT_NAME)
        with (folder / "rollout.log").open("wb") as log, listener:
            self.process = subprocess.Popen(
                rollout_command(config.rollout, listener.fileno(), folder),
                env=rollout_environment(config) | {PARENT_VARIABLE: str(os.getpid())},
                stdout=log, stderr=log, pass_fds=[listener.fileno()], start_new_session=True,
            )  # fmt: skip
            self.socket = sockets.connect(path)
        self.socket.settimeout(None)
        self.ask(start)

    def ask(self, message: Message) -> Message:
        """Sends a message; returns its reply."""
        self.socket.sendall(frames.encode(message))
        return decode_from_engine(frames.receive(self.socket))

    def generate(self, request: Generate, turns: list[NextTurn]) -> None:
        """Waits until all turns have ended."""
        ended, waiting = 0, turns
        reply = self.ask(request)
        while isinstance(reply, Progress):
            ended += len(reply.ended)
            reply = self.ask(NextTurns(turns=waiting, last=ended == len(turns)))
            waiting = []


def best(what: str, count: int, repetitions: int, run: Callable[[], object]) -> None:
    """Prints the seconds of the best repetition, and tokens a second if there are any."""
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    rate = f"  {count / min(seconds):8.0f} tokens/s" if count else ""
    print(f"{what:<28} {min(seconds):8.2f} s{rate}", flush=True)


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=("smollm2", "starter"), default="smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    config = SMOLLM2
    if options.shape == "starter":
        config = AutoConfig.from_pretrained(starter.FOLDER / "policy")
    torch.manual_seed(0)
    lm: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rows, tokens = options.rows, options.tokens
    ids = torch.randint(3, config.vocab_size, (rows, PROMPT))
    uniforms = torch.rand(rows, tokens, dtype=torch.float64)
    count = rows * tokens
    demo = config_file.load(starter.FOLDER / "demo.yaml", [f"rollout.batch_size={rows}"])
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir=shared_folder()) as shared,
    ):
        lm.config.save_pretrained(folder)
        head = config.hidden_size // config.num_attention_heads
        engine = Engine(
            Path(folder),
            Start(
                model=folder, dtype="float32", max_tokens=PROMPT + tokens, max_responses=rows,
                cache_bytes=cache_bytes(
                    demo.rollout, "float32", config.num_hidden_layers,
                    (config.num_key_value_heads or config.num_attention_heads) * head,
                    PROMPT + tokens,
                ),
            ),
        )  # fmt: skip
        path = Path(shared) / "weights.safetensors"

        def sync() -> None:
            written, sums = write_weights(lm, torch.float32, path)
            engine.ask(
                LoadWeights(weights_version=1, path=str(path), tensors=written, checksum=sums)
            )

        request = Generate(
            weights_version=1, at_once=rows, at_most=rows, max_new_tokens=tokens, temperature=1.0,
            sampling="gumbel", eos=[], look=False,
        )  # fmt: skip
        turns = [
            NextTurn(row, prompt, numbers.numpy().tobytes())
            for row, (prompt, numbers) in enumerate(zip(ids.tolist(), uniforms, strict=True))
        ]
        best("weights to vLLM", 0, options.repetitions, sync)
        best("vLLM", count, options.repetitions, lambda: engine.generate(request, turns))
        engine.socket.close()
        engine.process.wait()
    model = LanguageModel(lm)
    batch = batch_prompts([Prompt(row, "", {}) for row in ids.tolist()], 1, 0)
    asked = RolloutRequest(batch, uniforms, 1.0)
    criteria = StopCriteria([], [], NoText())
    best("native", count, options.repetitions,
         lambda: generate(model, asked, criteria, NoText()))  # fmt: skip
    sampled = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    with torch.no_grad():
        best("transformers' generate", count, options.repetitions,
             lambda: lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                                 min_new_tokens=tokens, **sampled))  # fmt: skip


if __name__ == "__main__":
    main()
