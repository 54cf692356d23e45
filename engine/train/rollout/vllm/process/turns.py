"""Generates the turns of one request, each as soon as it has arrived."""

import socket
from typing import Any

from engine.protocol.rollout.messages import (
    EndedTurn,
    Generate,
    NextTurn,
    NextTurns,
    Progress,
)
from engine.protocol.rollout.server import receive, send

LOOK_EVERY = 8
"""Tokens between two messages, unless a turn ends that others may follow."""


class Turns:
    """The turns of one :class:`Generate`: each is a request of vLLM, added when it arrives."""

    def __init__(self, llm: Any, request: Generate, connection: socket.socket) -> None:
        """Stores the arguments; `llm` is vLLM's `LLM`, with the weights of the request."""
        self._llm, self._request, self._connection = llm, request, connection
        self._names: dict[str, int] = {}
        """Names of the unfinished requests, ours and vLLM's → row."""
        self._tokens: dict[int, list[int]] = {}
        """The tokens so far of turns that have not been sent, by row."""
        self._running: dict[int, str] = {}
        """Our names of the unfinished requests, by row."""
        self._ended: list[int] = []
        """Rows whose turn is yet to be sent."""
        self._changed: dict[int, None] = {}
        """Rows with tokens that the client has not looked at, in order."""
        self._turns = 0
        self._done = 0
        """Tokens generated."""
        self._free = list(range(request.at_once))
        """Where numbers of no turn are stored."""
        self._places: dict[int, int] = {}
        """Where the numbers of each turn are that has not been sent, by row."""

    def run(self) -> None:
        """Generates until the client says that there are no more turns."""
        request, steps = self._request, 0
        self._llm.collective_rpc(
            "begin_turns",
            args=(request.at_once, request.max_new_tokens, request.temperature, request.sampling),
        )
        while True:
            ended = request.more_turns and self._ended
            if ended or not self._running or steps % LOOK_EVERY == 0:
                reply = self._exchange()
                self._stop([*self._running] if reply.last else reply.stop)
                if reply.last:
                    return
                self._add(reply.turns)
            if self._running:
                self._step()
                steps += 1

    def _exchange(self) -> NextTurns:
        """Sends what is new; returns the client's reply."""
        most = self._request.at_most
        sent, self._ended = self._ended[:most], self._ended[most:]
        looked = list(self._changed)[: 2 * most] if self._request.look else []
        message = Progress(
            weights_version=self._request.weights_version,
            busy=bool(self._running or self._ended),
            done=self._done,
            ended=self._taken(sent),
            tokens={row: self._tokens[row] for row in looked},
        )
        for row in looked:
            del self._changed[row]
        send(self._connection, message)
        reply = receive(self._connection)
        if not isinstance(reply, NextTurns):
            raise TypeError(f"expected next turns, got {reply}")
        return reply

    def _taken(self, rows: list[int]) -> list[EndedTurn]:
        """The turns of rows, which have ended."""
        if not rows:
            return []
        lengths = [(self._places[row], len(self._tokens[row])) for row in rows]
        recorded = self._llm.collective_rpc("recorded_turns", args=(lengths,))[0]
        self._free += [self._places.pop(row) for row in rows]
        return [
            EndedTurn(row, self._tokens.pop(row), *floats)
            for row, floats in zip(rows, recorded, strict=True)
        ]

    def _add(self, turns: list[NextTurn]) -> None:
        from vllm import SamplingParams  # noqa: PLC0415 - of vLLM's environment

        from engine.train.rollout.vllm.process.uniform_sampling import ROW  # noqa: PLC0415 - as above

        if not turns:
            return
        self._places.update((turn.row, self._free.pop()) for turn in turns)
        numbers = [(self._places[turn.row], turn.uniforms) for turn in turns]
        self._llm.collective_rpc("add_turns", args=(numbers,))
        for turn in turns:
            params = SamplingParams(
                temperature=1.0,  # ours is applied where the token is sampled
                max_tokens=len(turn.uniforms) // 8,
                stop_token_ids=self._request.eos,
                ignore_eos=True,
                detokenize=False,
                extra_args={ROW: self._places[turn.row]},
            )
            self._turns += 1
            ours = f"turn-{self._turns}"
            theirs = self._llm.llm_engine.add_request(
                ours, {"prompt_token_ids": turn.prompt}, params
            )
            self._names[ours] = self._names[theirs] = turn.row
            self._running[turn.row], self._tokens[turn.row] = ours, []

    def _step(self) -> None:
        """Generates a token of each turn that vLLM has begun."""
        for output in self._llm.llm_engine.step():
            row = self._names[output.request_id]
            if self._running.get(row) is None:
                continue
            tokens = list(output.outputs[0].token_ids)
            self._done += len(tokens) - len(self._tokens[row])
            self._tokens[row] = tokens
            self._changed[row] = None
            if output.finished:
                self._end(row)

    def _stop(self, rows: list[int]) -> None:
        """Ends the turns of rows, if they are still being generated."""
        running = [row for row in rows if row in self._running]
        if running:
            self._llm.llm_engine.abort_request([self._running[row] for row in running])
        for row in running:
            self._end(row)

    def _end(self, row: int) -> None:
        del self._running[row]
        self._changed.pop(row, None)
        self._ended.append(row)
