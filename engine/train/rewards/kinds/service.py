"""Reward source: a service that scores responses over HTTP."""

from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import torch

from engine.config.sections.reward import RewardSource
from engine.progress import ReportProgress
from engine.train.rewards.kinds.http_client import Endpoint, RequestError
from engine.train.rewards.scores import MAX_SCORE
from engine.train.rewards.source import (
    IncompleteScoresError,
    LoadContext,
    RewardInputs,
    RunsOn,
    Score,
    SourceKind,
)

Usable = Annotated[float, msgspec.Meta(ge=-MAX_SCORE, le=MAX_SCORE)]
"""A reply with a different number is unusable: the request counts as failed and is retried."""


class _JSONReply(msgspec.Struct):
    scores: list[Usable | list[Usable] | None]


class _OpenRLHFReply(msgspec.Struct):
    rewards: list[Usable]


class JSONProtocol:
    """Our own protocol; docs/rewards.md describes it."""

    def request(self, inputs: RewardInputs) -> bytes:
        """The request about B responses."""
        prompts = inputs.batch.prompts
        request: dict[str, object] = {
            "prompts": [p.text if p.messages is None else p.messages for p in prompts],
            "responses": inputs.texts,
            "columns": {key: [p.row.get(key) for p in prompts] for key in prompts[0].row},
            "step": inputs.step,
        }
        if any(p.messages is not None for p in prompts):
            request["messages"] = [
                None if p.messages is None else inputs.messages(i) for i, p in enumerate(prompts)
            ]
        return encode(request)

    def scores(self, endpoint: Endpoint, reply: bytes) -> list[Score]:
        """The scores in a reply. Raises RequestError."""
        return [*endpoint.decode(reply, _JSONReply).scores]


class OpenRLHFProtocol:
    """OpenRLHF's remote reward model (`--remote_rm_url`).

    A request has `query` (prompts with their responses, special tokens included), `prompts` and
    `labels` (empty texts without a column of labels; null for a prompt whose data set lacks it, as
    `datasets` fills it in when OpenRLHF mixes data sets). A reply has `rewards`; its `scores` and
    `extra_logs` are not used.
    """

    def __init__(self, label_column: str | None, vocabulary: dict[str, int]) -> None:
        """Creates the protocol.

        Args:
            label_column: see :attr:`engine.config.sections.reward.HTTPConfig.label_column`.
            vocabulary: the policy's token ids by token, for the end-of-sequence token's text.
        """
        self._label_column = label_column
        self._vocabulary = vocabulary
        self._ends: dict[int, str] = {}

    def request(self, inputs: RewardInputs) -> bytes:
        """The request about B responses. Raises ValueError if the data have no such labels."""
        prompts = [p.text for p in inputs.batch.prompts]
        queries = [
            prompt + response + (self._end(ids[-1]) if ended else "")
            for prompt, response, ids, ended in zip(
                prompts, inputs.texts, inputs.ids, inputs.eos, strict=True
            )
        ]
        column, rows = self._label_column, [p.row for p in inputs.batch.prompts]
        if column is not None and column not in rows[0]:  # all prompts have the same columns
            known = ", ".join(rows[0]) or "none"
            raise ValueError(f"http.label_column: '{column}' is no column of the data ({known})")
        labels = ["" if column is None else row[column] for row in rows]
        return encode({"query": queries, "prompts": prompts, "labels": labels})

    def _end(self, token_id: int) -> str:
        """The text of an end-of-sequence token, which is the token itself.

        Empty, as in a tokenizer's decoding, for one that only the model knows.
        """
        if token_id not in self._ends:
            found = (t for t, i in self._vocabulary.items() if i == token_id)
            self._ends[token_id] = next(found, "")
        return self._ends[token_id]

    def scores(self, endpoint: Endpoint, reply: bytes) -> list[Score]:
        """The scores in a reply. Raises RequestError."""
        return [*endpoint.decode(reply, _OpenRLHFReply).rewards]


Protocol = JSONProtocol | OpenRLHFProtocol


class ServiceReward:
    """Sends the responses to a service, `reward.batch_size` in a request."""

    def __init__(self, endpoint: Endpoint, protocol: Protocol, batch_size: int) -> None:
        self._endpoint = endpoint
        self._protocol = protocol
        self._batch_size = batch_size

    def __call__(self, inputs: RewardInputs, report: ReportProgress) -> list[Score]:
        """B scores; see :class:`Reward`.

        Raises:
            IncompleteScoresError: some requests failed.
        """
        rows = torch.arange(len(inputs)).split(self._batch_size)
        parts = [inputs.select(part) for part in rows]
        tasks = [self._task(self._protocol.request(part), len(part)) for part in parts]
        size = self._batch_size
        results, errors = self._endpoint.run_all(
            tasks, lambda done: report(min(done * size, len(inputs)), len(inputs))
        )
        scores = {i * size + k: s for i, part in results.items() for k, s in enumerate(part)}
        return complete(scores, len(inputs), errors, tasks)

    def _task(self, body: bytes, count: int) -> Callable[[], list[Score]]:
        def ask() -> list[Score]:
            scores = self._protocol.scores(self._endpoint, self._endpoint.post(body))
            if len(scores) != count:
                raise RequestError(
                    f"{self._endpoint.place}: {len(scores)} scores for {count} responses"
                )
            return scores

        return ask


def complete(
    scores: dict[int, Score],
    count: int,
    errors: dict[int, RequestError],
    tasks: list[Callable[[], list[Score]]],
) -> list[Score]:
    """Returns all scores in order.

    Args:
        scores: by response.
        count: B.
        errors: of failed requests, by task.
        tasks: the requests; a failed one is sent again to test whether the source works again.

    Raises:
        IncompleteScoresError: there are errors.
    """
    if not errors:
        return [scores[i] for i in range(count)]
    index, error = min(errors.items())
    failed = tasks[index]

    def works_again() -> bool:
        try:
            failed()
        except RequestError:
            return False
        return True

    raise IncompleteScoresError(
        str(error),
        scores,
        retry_after=max(e.retry_after for e in errors.values()),
        works_again=works_again,
    )


def encode(request: dict[str, object]) -> bytes:
    """Encodes a request as JSON; column values without a JSON type are sent as text."""
    return msgspec.json.encode(request, enc_hook=str)


def _load(source: RewardSource, context: LoadContext) -> ServiceReward:
    endpoint = Endpoint.of(source.value, source.http)
    protocol: Protocol = JSONProtocol()
    if source.protocol == "openrlhf":
        protocol = OpenRLHFProtocol(source.http.label_column, context.policy_vocabulary)
    return ServiceReward(endpoint, protocol, context.config.batch_size)


def default_name(url: str) -> str:
    """Returns the last part of a URL's path, or its host."""
    parts = urlsplit(url)
    return parts.path.rstrip("/").rsplit("/", 1)[-1] or str(parts.hostname)


KIND = SourceKind(runs_on=RunsOn.RANK_0, load=_load, default_name=default_name, remote=True)
