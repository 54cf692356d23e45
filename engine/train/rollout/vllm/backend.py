"""Generates rollouts with vLLM in one or several separate processes.

Rank 0 talks to the engines; the other ranks send it their prompts and receive their responses. Each
engine holds a copy of the policy's weights with a version: the step whose update produced these
weights. Every response carries the version reported by its engine.

An engine that ends, rejects an update, or holds other weights than were sent is abandoned. The
supervisor starts a new one, all ranks send it the weights again, and its part of the batch is
generated again from the beginning. The uniform numbers are the same, so the responses are too. The
other engines keep their weights and responses. If responses are generated in the background while
the policy changes, a new engine gets the same weights again from the file they were sent in.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from engine.examined import examined
from engine.progress import ReportProgress, report_nothing
from engine.protocol.rollout.messages import Converse, Generate, Generated, LoadWeights
from engine.train.data.prompts import PromptBatch
from engine.train.models.language_model import AnyModel
from engine.train.rollout.context import BackendContext
from engine.train.rollout.conversation import RunOnRank0, TurnSource
from engine.train.rollout.native.backend import NativeBackend
from engine.train.rollout.rollout import OnEnded, Rollout, assemble
from engine.train.rollout.vllm.background import BackgroundGeneration
from engine.train.rollout.vllm.client import EngineLostError
from engine.train.rollout.vllm.remote_engine import FORGETS_WEIGHTS
from engine.train.rollout.vllm.remote_engines import RemoteEngines
from engine.train.rollout.vllm.requests import join
from engine.train.rollout.vllm.weights import send_weights


class _Part(msgspec.Struct, frozen=True):
    """The prompts of one rank."""

    prompts: list[list[int]]
    limits: list[int]
    uniforms: bytes


@dataclass(frozen=True)
class _Work:
    """One rank's view of the work that all ranks generate together."""

    batch: PromptBatch
    """This rank's prompts."""
    limit: int
    """The most new tokens."""
    parts: list[_Part]
    """The ranks' distinct parts, which together form the request."""
    first: int
    """The row of this rank's first prompt in the request."""


class VllmPending:
    """Responses being generated in the background; see :meth:`VllmBackend.begin`."""

    def __init__(
        self,
        backend: "VllmBackend",
        work: _Work,
        generation: BackgroundGeneration[Generated] | None,
    ) -> None:
        self._backend, self._work = backend, work
        self.generation = generation
        """On rank 0."""

    def result(self, report: ReportProgress) -> Rollout:
        """Waits for the responses and returns this rank's; a collective.

        Raises:
            RlhfError: several engines in a row failed.
        """
        replies: dict[int, Generated] = {}
        if self.generation is not None:
            self.generation.wait(report)
            self.generation.check()
            replies = self.generation.replies
        return self._backend.distribute(self._work, replies)


class VllmBackend:
    """Generates with vLLM; the reference's responses, rarely needed, are generated natively."""

    separate = True

    def __init__(self, context: BackendContext) -> None:
        """On rank 0, tells the engines to build the model; does not wait for them.

        Raises:
            RlhfError: the supervisor offers no engine.
        """
        self._context = context
        self._native = NativeBackend.of(context)
        self._held: int | None = None
        """The version of the weights that all engines hold."""
        self._wanted = 0
        self._dtype = getattr(torch, context.config.model.dtype)
        self._engines = RemoteEngines(context) if context.ranks.is_lead else None
        self._update: LoadWeights | None = None
        """What the engines hold, on rank 0."""
        self._pending: VllmPending | None = None

    # -- the weights ---------------------------------------------------------------------------

    def sync(self, model: AnyModel, weights_version: int, report: ReportProgress) -> None:
        """Sends the policy's weights to the engines unless they hold this version; a collective.

        Raises:
            RlhfError: several engines in a row failed.
            UserInputError: the engines' environment cannot be used, or there is no room for the
                weights.
        """
        if model is not self._context.policy:
            return
        self._wanted = weights_version
        if self._held != weights_version:
            self._finish_pending(report)
            self._until_it_works(lambda: self._sync_once(report))

    def _sync_once(self, report: ReportProgress, besides: Collection[int] = ()) -> str:
        """Tries once to send the weights; returns why it failed, or "".

        Args:
            report: as in :meth:`sync`.
            besides: on rank 0, engines that need no weights now.
        """
        self._held, self._update = None, None
        if problem := self._on_lead(self._prepare):
            return problem
        lm, ahead = self._context.policy.lm, self._context.config.rollout.ahead
        engines = self._engines
        new = engines.new_update(self._wanted, besides) if engines is not None else None
        checksum = send_weights(lm, self._dtype, new.take if new is not None else None, report)

        def finish(_engines: RemoteEngines) -> None:
            if new is not None:
                self._update = new.finish(checksum)

        problem = self._on_lead(finish)
        # Generation ahead may need the file for a new engine after the policy has changed. The next
        # update replaces the file.
        if new is not None and (problem or not ahead):
            new.close()
        if not problem:
            self._held = self._wanted
        return problem

    def _prepare(self, engines: RemoteEngines) -> None:
        engines.prepare(lambda: self._context.announce(self._wanted, "load vLLM"))

    # -- responses -----------------------------------------------------------------------------

    def generate(
        self,
        model: AnyModel,
        batch: PromptBatch,
        uniforms: Tensor,
        temperature: float,
        *,
        per_prompt: int,
        limits: Tensor | None,
        report: ReportProgress,
        on_ended: OnEnded | None = None,
    ) -> Rollout:
        """Generates the ranks' responses with the weights of the last :meth:`sync`; a collective.

        An engine replies once all of its responses have ended, so `on_ended` is not called.

        Raises:
            RlhfError: several engines in a row failed.
        """
        if model is not self._context.policy:
            return self._native.generate(
                model, batch, uniforms, temperature,
                per_prompt=per_prompt, limits=limits, report=report, on_ended=on_ended,
            )  # fmt: skip
        self._finish_pending(report)
        work = self._gather(batch, uniforms, limits)
        # Only later turns of responses have limits of their own.
        request = self._request(work, temperature, later_turn=limits is not None)
        replies: dict[int, Generated] = {}

        def attempt() -> str:
            if self._held != self._wanted and (problem := self._sync_once(report, replies)):
                return problem
            problem = self._on_lead(
                lambda engines: engines.generate(engines.divide(request), replies, report)
            )
            if problem:
                self._held = None
            return problem

        self._until_it_works(attempt)
        if self._context.config.rollout.sleep == FORGETS_WEIGHTS:
            self._held = None
        return self.distribute(work, replies)

    def converse(
        self, turns: TurnSource | None, temperature: float, run: RunOnRank0, report: ReportProgress
    ) -> None:
        """Generates turns with the weights of the last :meth:`sync`; see :class:`TurnsBackend`.

        Raises:
            RlhfError: several engines in a row failed.
        """
        self._finish_pending(report)
        criteria = self._context.stop_criteria
        request = Converse(
            weights_version=self._wanted,
            at_once=0, at_most=0,  # for each engine
            max_new_tokens=0 if turns is None else turns.tokens,
            temperature=temperature,
            sampling=self._context.config.rollout.sampling,
            eos=criteria.eos_ids(torch.device("cpu")).tolist(),
            look=criteria.has_strings,
        )  # fmt: skip

        def attempt() -> str:
            if self._held != self._wanted and (problem := self._sync_once(report)):
                return problem
            errors: list[Exception] = []

            def act() -> None:
                if self._engines is not None and turns is not None:
                    try:
                        self._engines.converse(request, turns, report)
                    except Exception as error:  # not of the user's code
                        errors.append(error)

            run(act)

            def check(_engines: RemoteEngines) -> None:
                for error in errors:
                    raise error

            problem = self._on_lead(check)
            if problem:
                self._held = None
            return problem

        try:
            self._until_it_works(attempt)
        finally:  # also after an error of an environment, which ends a probe and not the run
            if self._context.config.rollout.sleep == FORGETS_WEIGHTS:
                self._held = None

    def begin(self, batch: PromptBatch, uniforms: Tensor, temperature: float) -> VllmPending:
        """Makes the engines generate the policy's responses in the background; a collective.

        The responses use the weights of the last :meth:`sync`, even if the policy changes
        meanwhile. Other uses of the backend wait until generation ends, without interrupting it.

        Args:
            batch: this rank's B prompts.
            uniforms: (B, T) float64.
            temperature: > 0.
        """
        self._finish_pending(report_nothing)
        work = self._gather(batch, uniforms, None)
        generation, engines, update = None, self._engines, self._update
        if engines is not None and update is not None:
            engines.forget_failures()
            requests = engines.divide(self._request(work, temperature))
            generation = engines.begin(update, requests)
        self._pending = VllmPending(self, work, generation)
        return self._pending

    def _finish_pending(self, report: ReportProgress) -> None:
        """Waits until the engines are free; keeps what they have generated."""
        pending, self._pending = self._pending, None
        if pending is not None and pending.generation is not None:
            pending.generation.wait(report)

    def _gather(self, batch: PromptBatch, uniforms: Tensor, limits: Tensor | None) -> _Work:
        """Gathers the prompts of all ranks; a collective."""
        ranks, (count, limit) = self._context.ranks, uniforms.shape
        part = _Part(
            [p.ids for p in batch.prompts],
            [limit] * count if limits is None else limits.tolist(),
            uniforms.double().contiguous().numpy().tobytes(),
        )
        gathered = ranks.all_gather_bytes(msgspec.msgpack.encode(part))
        distinct = list(dict.fromkeys(gathered))  # a probe is the same on all ranks
        parts = [msgspec.msgpack.decode(p, type=examined(_Part)) for p in distinct]
        before = parts[: distinct.index(gathered[ranks.rank])]
        return _Work(batch, uniforms.shape[1], parts, sum(len(p.prompts) for p in before))

    def _request(self, work: _Work, temperature: float, *, later_turn: bool = False) -> Generate:
        """The request for all ranks' prompts."""
        criteria = self._context.stop_criteria
        return Generate(
            weights_version=self._wanted,
            prompts=[prompt for part in work.parts for prompt in part.prompts],
            uniforms=b"".join(part.uniforms for part in work.parts),
            limits=[limit for part in work.parts for limit in part.limits],
            max_new_tokens=work.limit,
            temperature=temperature,
            sampling=self._context.config.rollout.sampling,
            eos=criteria.eos_ids(torch.device("cpu")).tolist(),
            look=criteria.has_strings,
            later_turn=later_turn,
        )

    def distribute(self, work: _Work, replies: dict[int, Generated]) -> Rollout:
        """Distributes the replies as the rollout of each rank's prompts; a collective.

        Args:
            work: what was generated.
            replies: rank 0's, by engine; ignored on other ranks.
        """
        result = self._context.ranks.broadcast(
            lambda: join([replies[i] for i in sorted(replies)]), Generated
        )
        return self._rollout(work, result)

    def _rollout(self, work: _Work, result: Generated) -> Rollout:
        """The rollout of this rank's prompts; tokens after a stop string are dropped."""
        criteria, device = self._context.stop_criteria, self._context.ranks.device
        batch, limit = work.batch, work.limit
        shape, all_rows = (len(batch.prompts), limit), (len(result.lengths), limit)
        mine = slice(work.first, work.first + shape[0])
        ids = _array(result.ids, torch.int32, all_rows)[mine].long()
        arrays = [_array(a, torch.float32, all_rows) for a in (result.logprobs, result.entropies)]
        floats = torch.stack([*(a[mine] for a in arrays), torch.zeros(shape)])
        lengths, stopped = list(result.lengths[mine]), [False] * shape[0]
        if criteria.has_strings:
            for row, response in enumerate(ids.tolist()):
                at = criteria.stops_at(response[: lengths[row]], 0)
                if at is not None:
                    lengths[row], stopped[row] = at + 1, True
        counts = torch.tensor(lengths)
        beyond = torch.arange(limit) >= counts[:, None]
        ids, floats = ids.masked_fill(beyond, 0), floats.masked_fill(beyond, 0.0)
        last = ids.gather(1, counts[:, None] - 1)
        eos = (last == criteria.eos_ids(torch.device("cpu"))).any(1)
        rollout = assemble(
            batch.to(device), ids.to(device), counts.to(device), eos.to(device),
            (eos | torch.tensor(stopped)).to(device), floats.to(device), self._context.tokenizer,
        )  # fmt: skip
        rollout.versions = torch.full((shape[0],), result.weights_version, device=device)
        return rollout

    # -- engines that fail ---------------------------------------------------------------------

    def _on_lead(self, act: Callable[[RemoteEngines], object]) -> str:
        """Runs a function on rank 0; returns on all ranks why engines were lost, or ""."""
        problem = ""
        if self._engines is not None:
            try:
                act(self._engines)
            except EngineLostError as error:
                problem = str(error)
        return self._context.ranks.broadcast_bytes(problem.encode()).decode()

    def _until_it_works(self, attempt: Callable[[], str]) -> None:
        """Repeats an attempt, replacing lost engines by new ones.

        Rank 0 raises RlhfError when several processes of an engine in a row have failed.
        """
        if self._engines is not None:
            self._engines.forget_failures()
        while attempt():
            pass


def _array(data: bytes, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
