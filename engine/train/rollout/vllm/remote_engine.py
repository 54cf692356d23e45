"""The engine as rank 0 uses it: building the model, sending weights, asking for responses.

Nothing here is a collective. One thread at a time may use it: the training loop, or the thread of
:class:`~engine.train.rollout.vllm.background.BackgroundGeneration` while that runs.
"""

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from engine.errors import RlhfError, UserInputError
from engine.launch.environment import ROLLOUT_DISK_VARIABLE, ROLLOUT_FOLDER_VARIABLE
from engine.memory.rollout_engine import cache_bytes, max_responses
from engine.protocol.rollout_messages import Generate, Generated, LoadWeights, Start
from engine.train.models.pretrained import save_configs
from engine.train.rollout.context import BackendContext
from engine.train.rollout.rollout import ReportProgress
from engine.train.rollout.stop_criteria import StopCriteria
from engine.train.rollout.vllm.client import EngineLostError, RolloutClient
from engine.train.rollout.vllm.requests import join, split
from engine.train.rollout.vllm.updates import BroadcastUpdate, FileUpdate, IpcUpdate, Update
from engine.train.rollout.vllm.weights import file_size, folder_with_room, inventory

log = logging.getLogger("engine")

ATTEMPTS = 4
"""How many engines in a row may fail before the run does."""
WEIGHTS = "weights.safetensors"
ROOM = 16
"""Tokens that the engine's longest sequence has beyond the longest prompt and response."""


class RemoteEngine:
    """An engine that the supervisor keeps alive, and the files by which it is given weights."""

    def __init__(self, context: BackendContext) -> None:
        """Has the engine build the model; does not wait for it.

        Raises:
            RlhfError: the supervisor offers no engine.
        """
        self._context = context
        self._client = RolloutClient()
        self._tokens = context.longest + context.config.rollout.max_new_tokens + ROOM
        """Of the longest sequence that the engine can hold."""
        self._folder = Path(os.environ.get(ROLLOUT_FOLDER_VARIABLE, ""))
        """In shared memory; the supervisor's."""
        self._disk = Path(os.environ.get(ROLLOUT_DISK_VARIABLE, self._folder))
        """On a disk, for weights that do not fit there; the supervisor's."""
        self._groups = 0
        """Groups with an engine's workers, for `rollout.transfer: broadcast`."""
        self._begin()

    def prepare(self, announce: Callable[[], object] = lambda: None) -> None:
        """Waits until an engine has built the model, a new one if the last has ended.

        Args:
            announce: called if that takes a while.

        Raises:
            EngineLostError: it ended.
            UserInputError: its environment cannot be used.
            RlhfError: no engine can be reached, or a new one would fail in the same way.
        """
        if not self._client.began:
            self._begin()
        if self._client.ready is None:
            announce()
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
                sleep=config.rollout.sleep,
            )
        )  # fmt: skip

    def _limited(self, tokens: int) -> int:
        positions = getattr(self._context.policy.lm.config, "max_position_embeddings", None)
        return tokens if positions is None else min(tokens, int(positions))

    # -- weights -------------------------------------------------------------------------------

    def new_update(self, version: int) -> Update:
        """The next update of the engine's weights. Files of earlier ones are removed.

        Raises:
            UserInputError: there is no room for the weights, or no GPU for a broadcast.
        """
        config, lm = self._context.config, self._context.policy.lm
        dtype = getattr(torch, config.model.dtype)
        tensors = inventory(lm, dtype)
        if config.rollout.transfer == "ipc":
            return IpcUpdate(self._client, version, tensors, dtype)
        if config.rollout.transfer == "broadcast":
            if self._context.ranks.device.type == "cuda" and not config.rollout.gpus:
                raise UserInputError(
                    "rollout.transfer: broadcast needs GPUs that no rank uses, in rollout.gpus; on "
                    "a GPU that vLLM shares with rank 0, use ipc"
                )
            self._groups += 1
            meeting = self._folder / f"group-{os.getpid()}-{self._groups}"
            place = meeting, config.rollout.tensor_parallel, self._context.ranks.device
            return BroadcastUpdate(self._client, version, tensors, dtype, place)
        for folder in (self._folder, self._disk):
            (folder / WEIGHTS).unlink(missing_ok=True)
        folder = folder_with_room([self._folder, self._disk], file_size(lm, dtype))
        return FileUpdate(self._client, version, tensors, dtype, folder / WEIGHTS)

    def close(self) -> None:
        """Ends the engine; the supervisor starts another one."""
        self._client.close()

    # -- responses -----------------------------------------------------------------------------

    def generate(
        self,
        requests: list[Generate],
        report: ReportProgress,
        stop_criteria: StopCriteria | None = None,
    ) -> list[Generated]:
        """Has the engine generate; returns a reply to each request.

        Args:
            requests: of the weights that the engine holds.
            report: called regularly with (tokens done, total).
            stop_criteria: those of the run; a copy where another thread may use them, too.

        Raises:
            EngineLostError: the engine ended, or is too small.
        """
        longest = max(len(p) + r.max_new_tokens for r in requests for p in r.prompts)
        if self._limited(longest) > self._limited(self._tokens):
            self._tokens = longest + ROOM
            raise EngineLostError(f"sequences of {longest} tokens need another engine")
        criteria = stop_criteria or self._context.stop_criteria
        total = sum(len(r.prompts) * r.max_new_tokens for r in requests)
        before, results = 0, []
        for request in requests:
            replies = []
            for part in split(request):

                def forward(done: int, _of_part: int, before: int = before) -> None:
                    report(before + done, total)

                replies.append(self._client.generate(part, _stopping(part, criteria), forward))
                before += len(part.prompts) * part.max_new_tokens
            results.append(join(replies))
        return results

    def generate_with(
        self, update: LoadWeights, requests: list[Generate], report: ReportProgress
    ) -> list[Generated]:
        """Generates with the weights of an update; an engine that fails is replaced.

        Args:
            update: what the engine holds. Its file must still be there: a new engine gets it again.
            requests: of these weights.
            report: called regularly with (tokens done, total).

        Raises:
            RlhfError: several engines in a row failed.
            UserInputError: the engine's environment cannot be used.
        """
        criteria = self._context.stop_criteria
        if criteria.has_strings:
            # Another thread must not find the tokenizer in use.
            criteria = copy.deepcopy(criteria)
        problem = ""
        for number in range(ATTEMPTS):
            try:
                if self._client.held is not update:
                    self.prepare()
                    self._client.load(update)
                return self.generate(requests, report, criteria)
            except EngineLostError as error:
                self.close()
                problem = str(error) or "no reason given"
                log_failure(number, problem)
        raise too_many_failures(problem)


def log_failure(number: int, problem: str) -> None:
    """Logs why an engine was lost, the `number`th in a row, from 0."""
    log.warning("rollout engine, attempt %d of %d: %s", number + 1, ATTEMPTS, problem)


def too_many_failures(problem: str) -> RlhfError:
    """The error of a run whose engines fail one after the other."""
    return RlhfError(f"{ATTEMPTS} rollout engines in a row failed, the last one with: {problem}")


def _stopping(
    request: Generate, criteria: StopCriteria
) -> Callable[[dict[int, list[int]]], list[int]]:
    """Which rows have a stop string, among those with new tokens."""
    searched = [0] * len(request.prompts)

    def look(tokens: dict[int, list[int]]) -> list[int]:
        ended = []
        for row, ids in tokens.items():
            if criteria.stops_at(ids, searched[row]) is not None:
                ended.append(row)
            searched[row] = len(ids)
        return ended

    return look
