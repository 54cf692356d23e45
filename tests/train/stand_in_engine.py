"""A rollout engine in a thread, which speaks vLLM's part of the protocol and generates natively.

It stands in where vLLM is not installed: what is tested is rank 0's side, and what becomes of
engines that fail. Each connection is a new engine, as the supervisor would start one.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine.launch.environment import ROLLOUT_FOLDER_VARIABLE, rollout_socket_variable
from engine.protocol import frames, sockets
from engine.protocol.rollout.messages import (
    EndedTurn,
    EngineFailed,
    EngineReady,
    Generate,
    Generated,
    LoadWeights,
    NextTurn,
    NextTurns,
    Progress,
    Start,
    WeightsLoaded,
    decode_to_engine,
)
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.models.language_model import LanguageModel
from engine.train.rollout.native.backend import generate
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.stop_criteria import StopCriteria
from engine.train.rollout.vllm.checksum import checksum
from engine.train.rollout.vllm.group import WeightsGroup

Fault = Callable[[Any], Any]
"""Called with each message; returns None to go on, a reply in place of the right one, or raises
ConnectionError to end the connection."""


class StandInEngine:
    """Serves one process of an engine after the other on the engine's socket."""

    def __init__(self, folder, monkeypatch, engine=0) -> None:
        self.listener, path = sockets.listen(folder, sockets.rollout_name(engine))
        shared = folder / "shared"
        shared.mkdir(exist_ok=True)
        monkeypatch.setenv(rollout_socket_variable(engine), str(path))
        monkeypatch.setenv(ROLLOUT_FOLDER_VARIABLE, str(shared))
        self.folder = shared
        self.faults: Iterator[Fault] = iter(())
        """The next engine's, one each; engines without one work."""
        self.messages: list[str] = []
        """The types of all messages received."""
        self.rows: list[int] = []
        """How many turns each request had."""
        self.turns: list[list[int]] = []
        """The rows of the turns in each message."""
        self.engines = 0
        self.stopped: list[int] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.engines += 1
            fault = next(self.faults, lambda _message: None)
            threading.Thread(target=self._serve, args=(connection, fault), daemon=True).start()

    def _serve(self, connection: socket.socket, fault: Fault) -> None:
        with connection, contextlib.suppress(ConnectionError):
            self._converse(connection, fault)

    def _converse(self, connection: socket.socket, fault: Fault) -> None:
        engine = _Model()
        while True:
            message = decode_to_engine(frames.receive(connection))
            self.messages.append(type(message).__name__)
            reply = fault(message)
            if reply is None and isinstance(message, Generate):
                reply = self._generate(connection, fault, engine, message)
            elif reply is None:
                reply = engine.reply(message)
            connection.sendall(frames.encode(reply))
            if isinstance(reply, EngineFailed):
                return

    def _generate(self, connection, fault, engine, request: Generate):
        """Generates all turns of each message; returns the last reply."""
        ended, tokens, done, count = [], {}, 0, 0
        while True:
            progress = Progress(weights_version=engine.version, busy=bool(tokens), done=done,
                                ended=[] if tokens else ended, tokens=tokens)  # fmt: skip
            connection.sendall(frames.encode(progress))
            message = decode_to_engine(frames.receive(connection))
            assert isinstance(message, NextTurns)
            if (reply := fault(message)) is not None:
                return reply
            if message.last:
                self.rows.append(count)
                return Generated(weights_version=engine.version)
            self.stopped += message.stop
            ended = ended if tokens else []
            assert len(ended) + len(message.turns) <= request.at_once
            assert len(message.turns) <= request.at_most
            new = engine.turns(request, message.turns) if message.turns else []
            self.turns += [[turn.row for turn in new]] if new else []
            count, done = count + len(new), done + sum(len(turn.ids) for turn in new)
            ended += new
            tokens = {turn.row: turn.ids for turn in new} if request.look else {}


class _Model:
    """What an engine holds."""

    def reply(self, message):
        if isinstance(message, Start):
            config = AutoConfig.from_pretrained(message.model)
            lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, message.dtype))
            self.model = LanguageModel(lm.eval(), None, getattr(torch, message.dtype)).eval()
            return EngineReady(pid=os.getpid(), engine="stand-in 1")
        assert isinstance(message, LoadWeights)
        weights = self.received(message)
        assert set(weights) == {t.name for t in message.tensors}
        missing = self.model.lm.load_state_dict(weights, strict=False).missing_keys
        assert not missing
        self.version = message.weights_version
        held = checksum(p for p in self.model.lm.parameters())
        return WeightsLoaded(
            weights_version=self.version, tensors=len(weights), checksum=held, seconds=0.0
        )

    def received(self, message):
        """The weights of an update."""
        if message.transfer == "file":
            return load_file(message.path)
        if message.path:
            self.group = WeightsGroup(message.path, 1, 2, torch.device("cpu"))
        weights = {t.name: torch.empty(t.shape) for t in message.tensors}
        for tensor in weights.values():
            self.group.broadcast(tensor)
        return weights

    def turns(self, request: Generate, turns: list[NextTurn]) -> list[EndedTurn]:
        limits = [len(turn.uniforms) // 8 for turn in turns]
        uniforms = torch.zeros(len(turns), request.max_new_tokens, dtype=torch.float64)
        for row, turn, limit in zip(uniforms, turns, limits, strict=True):
            row[:limit] = torch.frombuffer(bytearray(turn.uniforms), dtype=torch.float64)
        prompts = [Prompt(turn.prompt, "", {}) for turn in turns]
        tokenizer = _NoText()
        rollout = generate(
            self.model,
            RolloutRequest(batch_prompts(prompts, 1, 0), uniforms, request.temperature,
                           limits=torch.tensor(limits)),
            StopCriteria(request.eos, [], tokenizer), tokenizer, sampling=request.sampling,
        )  # fmt: skip
        return [
            EndedTurn(turn.row, rollout.ids[i, :n].tolist(),
                      *(x[i, :n].numpy().tobytes() for x in (rollout.logprobs, rollout.entropies)))
            for i, (turn, n) in enumerate(zip(turns, rollout.lengths.tolist(), strict=True))
        ]  # fmt: skip


class _NoText:
    """Takes the place of a tokenizer: the engine returns token ids."""

    def decode(self, *_args, **_options):
        return ""
