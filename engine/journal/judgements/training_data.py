"""Collects the judgements of sessions to train a reward model on."""

from collections.abc import Sequence

from msgspec import Struct

from engine.errors import UserInputError
from engine.journal.judgements.labels import LabelReader, Response
from engine.journal.judgements.recorded_conversation import (
    RecordedConversation,
    conversations_of_reference,
)
from engine.journal.rows import SampleRow
from engine.journal.samples import SampleReader
from engine.protocol.programs.reward_training import JudgedText
from engine.session.folder import SessionFolder

MIN_JUDGEMENTS = 20
"""Minimum number of judgements to train on: of fewer, only a handful would be held out."""
MIN_OF_A_KIND = 4
"""Minimum number of labels `good`, and of other labels, if there are no preferences."""

RESPONSES_FOR_SCALES = 128
"""Responses of each session on which the scales of the rewards are compared."""

_Text = tuple[int, str, str]
"""Index of the session, prompt, response."""


class Judgements(Struct, frozen=True):
    """Responses, and their judgements, which refer to responses by index."""

    responses: list[JudgedText]
    preferences: list[tuple[int, int]]
    """Chosen, rejected."""
    labels: list[tuple[int, bool]]
    """Response, and whether it is good."""
    newest: list[int]
    """The newest responses of the sessions, judged or not. Those that were judged are a selection,
    by default of similar scores, which says nothing about the scale."""

    @property
    def good(self) -> int:
        """The number of labels `good`."""
        return sum(good for _, good in self.labels)

    def __len__(self) -> int:
        return len(self.preferences) + len(self.labels)


def collect_judgements(sessions: Sequence[SessionFolder]) -> Judgements:
    """Reads labels and preferences of sessions, including those of abandoned branches.

    A text that was labelled several times has its last label.

    Raises:
        JournalError: a session's files cannot be read.
        UserInputError: there are too few judgements, or labels of one kind only.
    """
    collector = _Collector()
    for number, session in enumerate(sessions):
        collector.read(number, session)
    found = collector.judgements()
    _check(found, sessions)
    return found


class _Collector:
    def __init__(self) -> None:
        self._responses: list[JudgedText] = []
        self._index: dict[_Text, int] = {}
        self._labels: dict[int, bool] = {}
        self._preferences: dict[tuple[int, int], None] = {}
        self._newest: list[int] = []
        self._probed: dict[tuple[str, str], RecordedConversation] = {}
        """The reference's responses in the session that is read, by prompt and response."""

    def read(self, number: int, session: SessionFolder) -> None:
        """Adds the judgements of a session; `number` is its index."""
        with SampleReader(session) as samples:
            rows = {Response.of(row): row for row in samples.judged()}
            newest = {Response.of(row): row for row in samples.newest(RESPONSES_FOR_SCALES)}
        with LabelReader(session) as reader:
            judged, preferences = reader.judgements().values(), reader.preferences()
        self._probed = conversations_of_reference(
            session,
            {p.prompt for p in preferences if None in (p.chosen.attempt, p.rejected.attempt)},
        )
        for each in judged:
            if each.judgement.label is not None:
                index = self._add(number, each.prompt, each.response, rows)
                self._labels[index] = each.judgement.label == "good"
        for pair in preferences:
            chosen = self._add(number, pair.prompt, pair.chosen, rows)
            self._preferences[chosen, self._add(number, pair.prompt, pair.rejected, rows)] = None
        for response, row in newest.items():
            self._newest.append(self._add(number, row.prompt, response, newest))

    def _add(
        self, number: int, prompt: str, response: Response, rows: dict[Response, SampleRow]
    ) -> int:
        key = (number, prompt, response.response)
        if key not in self._index:
            self._index[key] = len(self._responses)
            row = rows.get(response)
            recorded = self._probed.get((prompt, response.response)) if row is None else row
            self._responses.append(
                JudgedText(
                    session=number, prompt=prompt, response=response.response,
                    messages=None if recorded is None else recorded.messages,
                    ended=row.ended if row is not None else True,
                    score=row.score if row is not None else None,
                )
            )  # fmt: skip
        return self._index[key]

    def judgements(self) -> Judgements:
        return Judgements(
            self._responses, list(self._preferences), list(self._labels.items()), self._newest
        )


def _check(found: Judgements, sessions: Sequence[SessionFolder]) -> None:
    names = ", ".join(session.name for session in sessions)
    good, other = found.good, len(found.labels) - found.good
    have = f"{names}: {len(found.preferences)} preferences, {good} labels good, {other} bad or hack"
    how = f"judge more with J on screen 3 of {sessions[0].command('attach')}"
    if len(found) < MIN_JUDGEMENTS:
        raise UserInputError(
            f"a reward model needs at least {MIN_JUDGEMENTS} judgements and there are {len(found)} "
            f"({have}; a text counts once, however often it was judged): {how}"
        )
    if len(found.preferences) < MIN_JUDGEMENTS and min(good, other) < MIN_OF_A_KIND:
        raise UserInputError(
            f"a reward model needs at least {MIN_OF_A_KIND} labels good and {MIN_OF_A_KIND} "
            f"bad or hack, or {MIN_JUDGEMENTS} preferences ({have}): {how}"
        )
