"""Controls one engine from rank 0: building the model, and generating.

Nothing here is a collective. One thread at a time may use an engine.
"""

from collections.abc import Callable

import torch

from engine.protocol.rollout.messages import (
    EndedTurn,
    Generate,
    LoadWeights,
    NextTurns,
    Progress,
    Start,
)
from engine.train.rollout.conversation import SampledTurn, TurnSource
from engine.train.rollout.stop_criteria import StopCriteria
from engine.train.rollout.vllm.client import EngineLostError, RolloutClient

FORGETS_WEIGHTS = 2
"""The level of `rollout.sleep` at which the engine must be sent the weights for each batch."""


def sampled_turn(turn: EndedTurn, criteria: StopCriteria, version: int) -> SampledTurn:
    """A turn without the tokens after a stop string."""
    at = criteria.stops_at(turn.ids, 0)
    ids = turn.ids if at is None else turn.ids[: at + 1]
    arrays = [torch.frombuffer(bytearray(a), dtype=torch.float32)[: len(ids)]
              for a in (turn.logprobs, turn.entropies)]  # fmt: skip
    eos = ids[-1] in criteria.eos_ids(torch.device("cpu")).tolist()
    # The default dtype may be that of an environment, whose code runs at the same time.
    floats = torch.stack([*arrays, torch.zeros(len(ids), dtype=torch.float32)])
    return SampledTurn(turn.row, ids, floats, eos, eos or at is not None, version)


class RemoteEngine:
    """An engine that the supervisor keeps alive."""

    def __init__(self, client: RolloutClient, start: Start) -> None:
        """Tells the engine to build a model; does not wait for it.

        Raises:
            RlhfError: the supervisor offers no engine.
        """
        self.client = client
        self.start = start
        """What the engine's next process should build."""
        client.begin(start)

    def prepare(self) -> None:
        """Waits until a process has built the model; uses a new process if the last one has ended.

        Raises:
            EngineLostError: it ended.
            UserInputError: its environment cannot be used.
            RlhfError: no engine can be reached, or a new one would fail in the same way.
        """
        if not self.client.began:
            self.client.begin(self.start)
        self.client.wait_ready()

    def generate(
        self,
        request: Generate,
        rows: range,
        turns: TurnSource,
        criteria: StopCriteria,
        report: Callable[[int], None],
    ) -> None:
        """Generates turns of responses with the weights that the engine holds.

        Args:
            request: what the turns have in common.
            rows: the responses whose turns it takes.
            turns: the turns.
            criteria: finds stop strings.
            report: called regularly with the tokens done.

        Raises:
            EngineLostError: the engine ended. What it has taken is ready again.
        """
        taken: set[int] = set()
        searched: dict[int, int] = {}

        def exchange(progress: Progress) -> NextTurns:
            stop = []
            with turns.lock:
                for turn in progress.ended:
                    taken.remove(turn.row)
                    turns.add(sampled_turn(turn, criteria, request.weights_version))
                for row, ids in progress.tokens.items():
                    if criteria.stops_at(ids, searched[row]) is not None:
                        stop.append(row)
                    searched[row] = len(ids)
            report(progress.done)
            at_most = min(request.at_most, request.at_once - len(taken))
            ready = turns.take(rows, at_most, wait=not progress.busy and not stop)
            taken.update(turn.row for turn in ready or ())
            searched.update((turn.row, 0) for turn in ready or ())
            return NextTurns(turns=ready or [], stop=stop, last=ready is None)

        try:
            self.client.generate(request, exchange)
        except BaseException as error:
            self.client.close()
            if isinstance(error, EngineLostError):
                turns.release(rows, taken)
            raise
        if self.start.sleep == FORGETS_WEIGHTS:
            self.client.held = None

    def generate_with(
        self,
        update: LoadWeights,
        request: Generate,
        rows: range,
        turns: TurnSource,
        criteria: StopCriteria,
        report: Callable[[int], None],
    ) -> None:
        """Generates with the weights of an update; replaces a process that fails.

        Args:
            update: the weights that the engine holds. Its file must still exist, since a new
                process reads it again.
            request: of these weights; as the other arguments for :meth:`generate`.
            rows: as above.
            turns: as above.
            criteria: must not be shared with the training loop.
            report: as above.

        Raises:
            RlhfError: several processes in a row failed.
            UserInputError: the engine's environment cannot be used.
        """
        while True:  # the client limits the number of attempts
            try:
                if self.client.held != update:
                    self.prepare()
                    self.client.load(update)
                return self.generate(request, rows, turns, criteria, report)
            except EngineLostError:
                continue
