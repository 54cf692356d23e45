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
    Continue,
    Converse,
    Conversed,
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
    TurnsProgress,
    WeightsLoaded,
    decode_to_engine,
)
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.models.language_model import LanguageModel
from engine.train.rollout.native.backend import generate
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
        """How many prompts each request had."""
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
                reply = self._generate(connection, engine, message)
            elif reply is None and isinstance(message, Converse):
                reply = self._take_turns(connection, fault, engine, message)
            elif reply is None:
                reply = engine.reply(message)
            connection.sendall(frames.encode(reply))
            if isinstance(reply, EngineFailed):
                return

    def _generate(self, connection, engine, request: Generate) -> Generated:
        self.rows.append(len(request.prompts))
        if not request.prompts:
            return Generated(weights_version=engine.version, lengths=[], ids=b"", logprobs=b"",
                             entropies=b"", seconds=0.0)  # fmt: skip
        result, tokens = engine.generate(request)
        seen = dict(enumerate(tokens)) if request.look else {}
        connection.sendall(frames.encode(Progress(done=1, total=2, tokens=seen)))
        answer = decode_to_engine(frames.receive(connection))
        assert isinstance(answer, Continue)
        self.stopped = answer.stop
        return result

    def _take_turns(self, connection, fault, engine, request: Converse):
        """Generates all turns of each message; returns the last reply."""
        ended = []
        while True:
            progress = TurnsProgress(weights_version=engine.version, busy=False, ended=ended)
            connection.sendall(frames.encode(progress))
            message = decode_to_engine(frames.receive(connection))
            assert isinstance(message, NextTurns)
            if (reply := fault(message)) is not None:
                return reply
            if message.last:
                return Conversed(weights_version=engine.version)
            assert len(message.turns) <= request.at_once
            self.turns.append([turn.row for turn in message.turns])
            ended = [engine.turn(request, turn) for turn in message.turns]


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

    def generate(self, request: Generate):
        prompts = [Prompt(ids, "", {}) for ids in request.prompts]
        uniforms = torch.frombuffer(bytearray(request.uniforms), dtype=torch.float64)
        uniforms = uniforms.view(len(prompts), request.max_new_tokens)
        tokenizer = _NoText()
        rollout = generate(
            self.model, batch_prompts(prompts, 1, 0), uniforms, request.temperature,
            StopCriteria(request.eos, [], tokenizer), tokenizer, sampling=request.sampling,
            limits=torch.tensor(request.limits),
        )  # fmt: skip
        width = request.max_new_tokens - rollout.ids.shape[1]
        ids, logprobs, entropies = (
            torch.nn.functional.pad(x, (0, width)).to(kind).numpy().tobytes()
            for x, kind in (
                (rollout.ids, torch.int32),
                (rollout.logprobs, torch.float32),
                (rollout.entropies, torch.float32),
            )
        )
        lengths = rollout.lengths.tolist()
        tokens = [row[:n] for row, n in zip(rollout.ids.tolist(), lengths, strict=True)]
        return Generated(
            weights_version=self.version, lengths=lengths, ids=ids, logprobs=logprobs,
            entropies=entropies, seconds=0.0,
        ), tokens  # fmt: skip

    def turn(self, request: Converse, turn: NextTurn) -> EndedTurn:
        limit = len(turn.uniforms) // 8
        result, (tokens,) = self.generate(
            Generate(
                weights_version=self.version, prompts=[turn.prompt], limits=[limit],
                uniforms=turn.uniforms, max_new_tokens=limit, temperature=request.temperature,
                sampling=request.sampling, eos=request.eos, look=False,
            )
        )  # fmt: skip
        n = 4 * len(tokens)
        return EndedTurn(turn.row, tokens, result.logprobs[:n], result.entropies[:n])


class _NoText:
    """Takes the place of a tokenizer: the engine returns token ids."""

    def decode(self, *_args, **_options):
        return ""
