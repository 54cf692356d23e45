"""Controls all engines from rank 0: sends weights, and divides responses among them.

Nothing here is a collective. One thread at a time may use it; the engines generate at the same
time, each with a thread of its own.
"""

import copy
import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
from msgspec.structs import replace

from engine.errors import RlhfError, UserInputError
from engine.launch.environment import ROLLOUT_DISK_VARIABLE, ROLLOUT_FOLDER_VARIABLE
from engine.memory.rollout_engine import cache_bytes, max_responses
from engine.progress import ReportProgress
from engine.protocol.frames import MAX_FRAME
from engine.protocol.rollout.messages import Generate, LoadWeights, Start
from engine.train.models.pretrained import save_configs
from engine.train.rollout.context import BackendContext
from engine.train.rollout.conversation import TurnSource
from engine.train.rollout.vllm.background import BackgroundGeneration, Job
from engine.train.rollout.vllm.client import EngineLostError, RolloutClient, raise_first
from engine.train.rollout.vllm.remote_engine import RemoteEngine
from engine.train.rollout.vllm.updates import BroadcastUpdate, FileUpdate, IpcUpdate, Update
from engine.train.rollout.vllm.weights import file_size, folder_with_room, inventory

WEIGHTS = "weights.safetensors"
BUDGET = MAX_FRAME - 64 * 1024
"""Most bytes for the turns of a message; the rest is for parts of constant size."""
WAITING = 64
"""An engine holds the numbers of twice as many responses as it generates at once, or of twice as
many as this, so that others can begin before it is sent more."""
ROOM = 16
"""Extra tokens in the engines' maximum length, beyond the longest prompt and response."""


class RemoteEngines:
    """The `rollout.engines` engines, and the files through which they receive weights."""

    def __init__(self, context: BackendContext) -> None:
        """Tells the engines to build the model; does not wait for them.

        Raises:
            RlhfError: the supervisor offers no engine.
        """
        self._context = context
        self._tokens = context.longest + context.config.rollout.max_new_tokens + ROOM
        """Length in tokens of the longest sequence that the engines support."""
        self._folder = Path(os.environ.get(ROLLOUT_FOLDER_VARIABLE, ""))
        """The supervisor's folder in shared memory."""
        self._disk = Path(os.environ.get(ROLLOUT_DISK_VARIABLE, self._folder))
        """The supervisor's folder on a disk, for weights that do not fit in shared memory."""
        self._groups = 0
        """Updates that were broadcast; their engines may meet rank 0 in a new group."""
        model = self._folder / "model"
        model.mkdir(exist_ok=True)
        save_configs(context.policy.lm, str(model))
        count, start = context.config.rollout.engines, self._start(model)
        self._engines = [RemoteEngine(RolloutClient(i, count), start) for i in range(count)]

    def prepare(self, announce: Callable[[], object] = lambda: None) -> None:
        """Waits until all engines have built the model, including replacements of ended ones.

        Args:
            announce: called if this takes a while.

        Raises:
            EngineLostError: some ended.
            UserInputError: their environment cannot be used.
            RlhfError: no engine can be reached, or a new one would fail in the same way.
        """
        waiting = [e for e in self._engines if e.client.ready is None]
        if waiting:
            announce()
        errors: list[Exception] = []
        for engine in waiting:
            try:
                engine.prepare()
            except (EngineLostError, RlhfError) as error:
                errors.append(error)
        raise_first(errors)

    def _start(self, model: Path) -> Start:
        """Describes what the engines build: a model with the policy's configuration."""
        config, lm = self._context.config, self._context.policy.lm
        heads = getattr(lm.config, "num_key_value_heads", None) or lm.config.num_attention_heads
        size = getattr(lm.config, "head_dim", None)
        size = size or lm.config.hidden_size // lm.config.num_attention_heads
        return Start(
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
        )  # fmt: skip

    def _limited(self, tokens: int) -> int:
        positions = getattr(self._context.policy.lm.config, "max_position_embeddings", None)
        return tokens if positions is None else min(tokens, int(positions))

    def forget_failures(self) -> None:
        """Resets the counts of processes lost in a row."""
        for engine in self._engines:
            engine.client.failures = 0

    # -- weights -------------------------------------------------------------------------------

    def new_update(self, version: int, besides: Collection[int]) -> Update:
        """Creates the next update of the engines' weights, and removes files of earlier ones.

        It is sent to the engines that do not hold this version yet.

        Args:
            version: of the weights.
            besides: engines that no longer need it.

        Raises:
            UserInputError: there is no room for the weights, or no GPU for a broadcast.
        """
        config, lm = self._context.config, self._context.policy.lm
        dtype = getattr(torch, config.model.dtype)
        tensors = inventory(lm, dtype)
        clients = [
            e.client
            for i, e in enumerate(self._engines)
            if i not in besides
            and (e.client.held is None or e.client.held.weights_version != version)
        ]
        if config.rollout.transfer == "ipc":
            return IpcUpdate(clients[0], version, tensors, dtype)
        if config.rollout.transfer == "broadcast":
            if self._context.ranks.device.type == "cuda" and not config.rollout.gpus:
                raise UserInputError(
                    "rollout.transfer: broadcast needs GPUs that no rank uses, in rollout.gpus; on "
                    "a GPU that vLLM shares with rank 0, use ipc"
                )
            self._groups += 1
            return BroadcastUpdate(
                clients, version, tensors, dtype,
                rendezvous=self._folder / f"group-{os.getpid()}-{self._groups}",
                workers=config.rollout.tensor_parallel, device=self._context.ranks.device,
            )  # fmt: skip
        for folder in (self._folder, self._disk):
            (folder / WEIGHTS).unlink(missing_ok=True)
        folder = folder_with_room([self._folder, self._disk], file_size(lm, dtype))
        return FileUpdate(clients, version, tensors, dtype, folder / WEIGHTS)

    # -- responses -----------------------------------------------------------------------------

    def generate(
        self, request: Generate, turns: TurnSource, done: set[int], report: ReportProgress
    ) -> None:
        """Makes all engines generate turns of responses, each as soon as it can begin.

        Args:
            request: what the turns have in common, for all responses.
            turns: the turns.
            done: engines that have generated their part before; others that do so now are added.
            report: called regularly with (tokens done, total).

        Raises:
            EngineLostError: an engine ended, or all are too small. The turns of the others have
                been generated.
        """
        if not self._fits(turns.longest):
            raise EngineLostError(f"sequences of {turns.longest} tokens need another engine")
        jobs: dict[int, Job] = {
            i: partial(engine.generate, part, rows, turns, self._context.stop_criteria)
            for i, (engine, part, rows) in enumerate(self._divided(request, turns))
            if i not in done
        }
        generation = BackgroundGeneration(jobs, turns.count * turns.tokens)
        generation.wait(report, turns.meanwhile)
        done |= generation.succeeded
        generation.check()

    def begin(
        self, update: LoadWeights, request: Generate, turns: TurnSource
    ) -> BackgroundGeneration:
        """Makes the engines generate with an update's weights while the caller continues.

        An engine that fails is replaced, and the new one gets the weights from the update's file.

        Args:
            update: the weights that the engines hold. Its file must exist until generation ends.
            request: of these weights; as in :meth:`generate`.
            turns: as in :meth:`generate`.
        """
        self._fits(turns.longest)
        criteria = self._context.stop_criteria
        if criteria.has_strings:  # the training loop may be using the tokenizer
            criteria = copy.deepcopy(criteria)
        jobs: dict[int, Job] = {
            i: partial(engine.generate_with, update, part, rows, turns, criteria)
            for i, (engine, part, rows) in enumerate(self._divided(request, turns))
        }
        return BackgroundGeneration(jobs, turns.count * turns.tokens)

    def _divided(
        self, request: Generate, turns: TurnSource
    ) -> list[tuple[RemoteEngine, Generate, range]]:
        """Each engine with its request and its responses, contiguous rows; some may have none.

        Responses to one prompt are adjacent rows, so nearly every prompt is processed and cached by
        a single engine. The numbers of rows differ by at most one.
        """
        count, at_most, found = len(self._engines), turns_in_message(turns.longest), []
        for i, engine in enumerate(self._engines):
            rows = range(turns.count * i // count, turns.count * (i + 1) // count)
            most = 2 * max(engine.start.max_responses, WAITING)
            part = replace(request, at_once=min(max(len(rows), 1), most), at_most=at_most)
            found.append((engine, part, rows))
        return found

    def _fits(self, longest: int) -> bool:
        """Ends the engines if a sequence of this length is too long for them."""
        if self._limited(longest) <= self._limited(self._tokens):
            return True
        self._tokens = longest + ROOM
        for engine in self._engines:
            engine.client.close()
            engine.start = self._start(Path(engine.start.model))
        return False


def turns_in_message(longest: int) -> int:
    """Maximum number of turns in a message, if a prompt and its turn have so many tokens."""
    # A token of EndedTurn is up to 13 bytes, one of NextTurn also, and one of `tokens` 5.
    return max(1, BUDGET // 2 // (13 * longest))
