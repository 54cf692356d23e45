"""Generates rollouts with vLLM in one or several separate processes.

Rank 0 talks to the engines; the other ranks send it their prompts and receive their responses. Each
engine holds a copy of the policy's weights with a version: the step whose update produced these
weights. Every response carries the version reported by its engine.

An engine that ends, rejects an update, or holds other weights than were sent is abandoned. The
supervisor starts a new one, all ranks send it the weights again, and its part of the batch is
generated again from the beginning; of responses with an environment, only the turns that were under
way. The uniform numbers are the same, so the responses are too. The other engines keep their
weights and responses. If responses are generated in the background while the policy changes, a new
engine gets the same weights again from the file they were sent in.
"""

from collections.abc import Callable, Collection

import msgspec
import torch

from engine.examined import examined
from engine.progress import ReportProgress, report_nothing
from engine.protocol.rollout.messages import Generate, LoadWeights
from engine.train.distributed.compute_on_rank_0 import compute_on_rank_0
from engine.train.models.language_model import AnyModel
from engine.train.rollout.context import BackendContext
from engine.train.rollout.conversation import RunOnRank0, TurnSource
from engine.train.rollout.native.backend import NativeBackend
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.rollout import OnEnded, Rollout
from engine.train.rollout.vllm.background import BackgroundGeneration
from engine.train.rollout.vllm.client import EngineLostError
from engine.train.rollout.vllm.remote_engine import FORGETS_WEIGHTS
from engine.train.rollout.vllm.remote_engines import RemoteEngines
from engine.train.rollout.vllm.weights import send_weights
from engine.train.rollout.vllm.whole_responses import EndedResponse, Part, WholeResponses, Work


class VllmPending:
    """Responses being generated in the background; see :meth:`VllmBackend.begin`."""

    def __init__(
        self, backend: "VllmBackend", work: Work, generation: BackgroundGeneration | None
    ) -> None:
        self._backend, self._work = backend, work
        self.generation = generation
        """On rank 0."""

    def result(self, report: ReportProgress) -> Rollout:
        """Waits for the responses and returns this rank's; a collective.

        Raises:
            RlhfError: several engines in a row failed.
        """
        self._backend.wait_for(self, report)
        if self.generation is not None:
            self.generation.check()
        return self._backend.distribute(self._work)


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
        request: RolloutRequest,
        report: ReportProgress,
        on_ended: OnEnded | None = None,
    ) -> Rollout:
        """Generates the ranks' responses with the weights of the last :meth:`sync`; a collective.

        Raises:
            RlhfError: several engines in a row failed.
        """
        if model is not self._context.policy:
            return self._native.generate(model, request, report, on_ended)
        work, temperature = self._gather(request, on_ended), request.temperature
        later_turn = request.limits is not None
        message = self._message(work.responses, temperature, later_turn=later_turn)
        self._generate(
            message, work.responses, lambda act: self._run_on_rank_0(act, report), report
        )
        return self.distribute(work)

    def converse(
        self, turns: TurnSource | None, temperature: float, run: RunOnRank0, report: ReportProgress
    ) -> None:
        """Generates turns with the weights of the last :meth:`sync`; see :class:`TurnsBackend`.

        Raises:
            RlhfError: several engines in a row failed.
        """
        self._generate(self._message(turns, temperature, more_turns=True), turns, run, report)

    def _generate(
        self,
        message: Generate,
        turns: TurnSource | None,
        run: RunOnRank0,
        report: ReportProgress,
    ) -> None:
        """Makes the engines generate; the arguments are those of :meth:`converse`."""
        self._finish_pending(report)
        done: set[int] = set()
        """Engines that have generated their part."""

        def attempt() -> str:
            if self._held != self._wanted and (problem := self._sync_once(report, done)):
                return problem
            errors: list[Exception] = []

            def act(report: ReportProgress) -> None:
                if self._engines is not None and turns is not None:
                    try:
                        self._engines.generate(message, turns, done, report)
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

    def begin(self, request: RolloutRequest) -> VllmPending:
        """Makes the engines generate the policy's responses in the background; a collective.

        The responses use the weights of the last :meth:`sync`, even if the policy changes
        meanwhile. Other uses of the backend wait until generation ends, without interrupting it.
        """
        self._finish_pending(report_nothing)
        work = self._gather(request, None)
        generation, engines, update = None, self._engines, self._update
        if engines is not None and update is not None and work.responses is not None:
            engines.forget_failures()
            message = self._message(work.responses, request.temperature)
            generation = engines.begin(update, message, work.responses)
        self._pending = VllmPending(self, work, generation)
        return self._pending

    def _finish_pending(self, report: ReportProgress) -> None:
        """Waits until the engines are free; keeps what they have generated. A collective."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.wait_for(pending, report)

    def wait_for(self, pending: VllmPending, report: ReportProgress) -> None:
        """Waits until responses have been generated, or cannot be; a collective."""

        def wait(report: ReportProgress) -> None:
            if pending.generation is not None:
                pending.generation.wait(report)

        self._run_on_rank_0(wait, report)

    def _run_on_rank_0(self, act: Callable[[ReportProgress], None], report: ReportProgress) -> None:
        """Calls a function on rank 0; meanwhile the other ranks report that they wait."""

        def compute(others_wait: Callable[[], None]) -> bytes:
            def reporting(done: int, total: int) -> None:
                report(done, total)
                others_wait()

            act(reporting)
            return b"."

        compute_on_rank_0(self._context.ranks, compute, lambda: report(0, 1))

    def _gather(self, request: RolloutRequest, on_ended: OnEnded | None) -> Work:
        """Gathers the requests of all ranks; a collective."""
        ranks, (count, limit) = self._context.ranks, request.uniforms.shape
        part = Part(
            [p.ids for p in request.batch.prompts],
            [limit] * count if request.limits is None else request.limits.tolist(),
            request.uniforms.double().contiguous().numpy().tobytes(),
        )
        gathered = ranks.all_gather_bytes(msgspec.msgpack.encode(part))
        distinct = list(dict.fromkeys(gathered))  # a probe is the same on all ranks
        parts = [msgspec.msgpack.decode(p, type=examined(Part)) for p in distinct]
        before = parts[: distinct.index(gathered[ranks.rank])]
        first = sum(len(p.prompts) for p in before)
        responses = WholeResponses(parts, limit, on_ended) if ranks.is_lead else None
        return Work(request, first, responses)

    def _message(
        self,
        turns: TurnSource | None,
        temperature: float,
        *,
        later_turn: bool = False,
        more_turns: bool = False,
    ) -> Generate:
        """What the turns of all engines have in common; only rank 0 sends it."""
        criteria = self._context.stop_criteria
        return Generate(
            weights_version=self._wanted,
            at_once=0, at_most=0,  # for each engine
            max_new_tokens=0 if turns is None else turns.tokens,
            temperature=temperature,
            sampling=self._context.config.rollout.sampling,
            eos=criteria.eos_ids(torch.device("cpu")).tolist(),
            look=criteria.has_strings,
            later_turn=later_turn,
            more_turns=more_turns,
        )  # fmt: skip

    def distribute(self, work: Work) -> Rollout:
        """Returns the rollout of this rank's prompts; a collective."""
        responses, context = work.responses, self._context
        ended = context.ranks.broadcast(
            lambda: responses.ended() if responses is not None else [], list[EndedResponse]
        )
        return work.rollout(ended, context.ranks.device, context.tokenizer)

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
