"""Rollouts by a vLLM engine in a process of its own.

Rank 0 talks to the engine; the other ranks send it their prompts and receive their responses. The
engine holds a copy of the policy's weights, which has a version: the step after whose update the
policy had these weights. Every response carries the version that the engine reports for it.

An engine that ends, refuses an update or holds other weights than were sent is left. The supervisor
starts a new one, all ranks send it the weights again, and the batch is generated from the
beginning: with the same uniform numbers, the responses are the same.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from engine.errors import RlhfError
from engine.launch.environment import ROLLOUT_DISK_VARIABLE, ROLLOUT_FOLDER_VARIABLE
from engine.memory.rollout_engine import cache_bytes, max_responses
from engine.protocol.rollout_messages import Generate, Generated, LoadWeights, Start
from engine.train.data.prompts import PromptBatch
from engine.train.models.language_model import AnyModel
from engine.train.models.pretrained import save_configs
from engine.train.rollout.context import BackendContext
from engine.train.rollout.native import NativeBackend
from engine.train.rollout.rollout import ReportProgress, Rollout, assemble
from engine.train.rollout.vllm.client import EngineLostError, RolloutClient
from engine.train.rollout.vllm.requests import join, split
from engine.train.rollout.vllm.weights import file_size, folder_with_room, write_weights

log = logging.getLogger("engine")

ATTEMPTS = 4
"""How many engines in a row may fail before the run does."""
WEIGHTS = "weights.safetensors"
ROOM = 16
"""Tokens that the engine's longest sequence has beyond the longest prompt and response."""


class _Part(msgspec.Struct, frozen=True):
    """The prompts of one rank."""

    prompts: list[list[int]]
    uniforms: bytes


class VllmBackend:
    """Generates with vLLM; the reference's responses, which few things need, are native."""

    separate = True

    def __init__(self, context: BackendContext) -> None:
        """On rank 0, has the engine build the model; does not wait for it.

        Raises:
            RlhfError: the supervisor offers no engine.
        """
        self._context = context
        self._native = NativeBackend.of(context)
        self._client = RolloutClient()
        self._held: int | None = None
        """The version of the weights that the engine holds."""
        self._wanted = 0
        config = context.config
        self._tokens = context.longest + config.rollout.max_new_tokens + ROOM
        """Of the longest sequence that the engine can hold."""
        self._dtype = getattr(torch, config.model.dtype)
        if context.ranks.is_lead:
            self._folder = Path(os.environ.get(ROLLOUT_FOLDER_VARIABLE, ""))
            """In shared memory; the supervisor's."""
            self._disk = Path(os.environ.get(ROLLOUT_DISK_VARIABLE, self._folder))
            """On a disk, for weights that do not fit there; the supervisor's."""
            self._begin()

    # -- the weights ---------------------------------------------------------------------------

    def sync(self, model: AnyModel, weights_version: int, report: ReportProgress) -> None:
        """Sends the policy's weights to the engine unless it holds this version; a collective.

        Raises:
            RlhfError: several engines in a row failed.
            UserInputError: the engine's environment cannot be used, or there is no room for the
                weights.
        """
        if model is not self._context.policy:
            return
        self._wanted = weights_version
        if self._held != weights_version:
            self._until_it_works(lambda: self._sync_once(report))

    def _sync_once(self, report: ReportProgress) -> str:
        """One try; returns why it failed, or ""."""
        self._held = None
        if problem := self._on_lead(self._prepare):
            return problem
        path = self._weights_file() if self._context.ranks.is_lead else None
        tensors, checksum = write_weights(self._context.policy.lm, self._dtype, path, report)
        update = LoadWeights(
            weights_version=self._wanted, path=str(path), tensors=tensors, checksum=checksum
        )
        problem = self._on_lead(lambda: self._client.load(update))
        if path is not None:
            path.unlink(missing_ok=True)
        if not problem:
            self._held = self._wanted
        return problem

    def _weights_file(self) -> Path:
        folders = [self._folder, self._disk]
        for folder in folders:  # left by an update that failed
            (folder / WEIGHTS).unlink(missing_ok=True)
        return folder_with_room(folders, file_size(self._context.policy.lm, self._dtype)) / WEIGHTS

    def _prepare(self) -> None:
        if not self._client.began:
            self._begin()
        if self._client.ready is None:
            self._context.announce(self._wanted, "load vLLM")
            self._client.wait_ready()

    def _begin(self) -> None:
        """Has a new engine build a model of the policy's configuration."""
        config, lm = self._context.config, self._context.policy.lm
        heads = getattr(lm.config, "num_key_value_heads", None) or lm.config.num_attention_heads
        size = getattr(lm.config, "head_dim", None)
        size = size or lm.config.hidden_size // lm.config.num_attention_heads
        model = self._folder / "model"
        model.mkdir(exist_ok=True)
        save_configs(lm, str(model))
        self._client.begin(
            Start(
                model=str(model),
                dtype=config.model.dtype,
                max_tokens=self._limited(self._tokens),
                max_responses=max_responses(config.rollout),
                cache_bytes=cache_bytes(
                    config.rollout, config.model.dtype, lm.config.num_hidden_layers, heads * size,
                    self._tokens,
                ),
                tensor_parallel=config.rollout.tensor_parallel,
            )
        )  # fmt: skip

    def _limited(self, tokens: int) -> int:
        positions = getattr(self._context.policy.lm.config, "max_position_embeddings", None)
        return tokens if positions is None else min(tokens, int(positions))

    # -- responses -----------------------------------------------------------------------------

    def generate(
        self,
        model: AnyModel,
        batch: PromptBatch,
        uniforms: Tensor,
        temperature: float,
        *,
        per_prompt: int,
        report: ReportProgress,
    ) -> Rollout:
        """Generates the ranks' responses with the weights of the last :meth:`sync`; a collective.

        Raises:
            RlhfError: several engines in a row failed.
        """
        if model is not self._context.policy:
            return self._native.generate(
                model, batch, uniforms, temperature, per_prompt=per_prompt, report=report
            )
        ranks = self._context.ranks
        part = _Part(
            [p.ids for p in batch.prompts], uniforms.double().contiguous().numpy().tobytes()
        )
        gathered = ranks.all_gather_bytes(msgspec.msgpack.encode(part))
        distinct = list(dict.fromkeys(gathered))  # a probe is the same on all ranks
        parts = [msgspec.msgpack.decode(p, type=_Part) for p in distinct]
        results: list[Generated] = []

        def attempt() -> str:
            nonlocal results
            if self._held != self._wanted and (problem := self._sync_once(report)):
                return problem
            requests = [self._request(p, uniforms.shape[1], temperature) for p in parts]
            problem = self._on_lead(lambda: results.extend(self._ask(requests, report)))
            if problem:
                self._held = None
                results = []
            return problem

        self._until_it_works(attempt)
        results = msgspec.msgpack.decode(
            ranks.broadcast_bytes(msgspec.msgpack.encode(results)), type=list[Generated]
        )
        mine = results[distinct.index(gathered[ranks.rank])]
        return self._rollout(batch, mine, uniforms.shape[1])

    def _request(self, part: _Part, limit: int, temperature: float) -> Generate:
        criteria = self._context.stop_criteria
        return Generate(
            weights_version=self._wanted,
            prompts=part.prompts,
            uniforms=part.uniforms,
            max_new_tokens=limit,
            temperature=temperature,
            sampling=self._context.config.rollout.sampling,
            eos=criteria.eos_ids(torch.device("cpu")).tolist(),
            look=criteria.has_strings,
        )

    def _ask(self, requests: list[Generate], report: ReportProgress) -> list[Generated]:
        longest = max(len(p) + r.max_new_tokens for r in requests for p in r.prompts)
        if self._limited(longest) > self._limited(self._tokens):
            self._tokens = longest + ROOM
            raise EngineLostError(f"sequences of {longest} tokens need another engine")
        total = sum(len(r.prompts) * r.max_new_tokens for r in requests)
        before, results = 0, []
        for request in requests:
            replies = []
            for part in split(request):

                def forward(done: int, _of_part: int, before: int = before) -> None:
                    report(before + done, total)

                replies.append(self._client.generate(part, self._stopping(part), forward))
                before += len(part.prompts) * part.max_new_tokens
            results.append(join(replies))
        return results

    def _stopping(self, request: Generate) -> Callable[[dict[int, list[int]]], list[int]]:
        """Which rows have a stop string, among those with new tokens."""
        searched = [0] * len(request.prompts)

        def look(tokens: dict[int, list[int]]) -> list[int]:
            ended = []
            for row, ids in tokens.items():
                if self._context.stop_criteria.stops_at(ids, searched[row]) is not None:
                    ended.append(row)
                searched[row] = len(ids)
            return ended

        return look

    def _rollout(self, batch: PromptBatch, result: Generated, limit: int) -> Rollout:
        """The rollout of this rank's prompts; tokens after a stop string are dropped."""
        criteria, device = self._context.stop_criteria, self._context.ranks.device
        shape = (len(batch.prompts), limit)
        ids = _array(result.ids, torch.int32, shape).long()
        floats = torch.stack(
            [_array(a, torch.float32, shape) for a in (result.logprobs, result.entropies)]
            + [torch.zeros(shape)]
        )
        lengths, stopped = list(result.lengths), [False] * shape[0]
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

    def _on_lead(self, act: Callable[[], object]) -> str:
        """Runs something on rank 0; returns on all ranks why the engine was lost, or ""."""
        problem = ""
        if self._context.ranks.is_lead:
            try:
                act()
            except EngineLostError as error:
                self._client.close()
                problem = str(error) or "no reason given"
        return self._context.ranks.broadcast_bytes(problem.encode()).decode()

    def _until_it_works(self, attempt: Callable[[], str]) -> None:
        problem = ""
        for number in range(ATTEMPTS):
            problem = attempt()
            if not problem:
                return
            log.warning("rollout engine, attempt %d of %d: %s", number + 1, ATTEMPTS, problem)
        raise RlhfError(f"{ATTEMPTS} rollout engines in a row failed, the last one with: {problem}")


def _array(data: bytes, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
