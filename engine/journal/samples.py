"""What the policy wrote, with what the operators think of it: samples.db beside labels.db."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Self

import msgspec

from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase, limit
from engine.journal.labels import LabelReader, attach
from engine.journal.rows import Judgement, SampleRow
from engine.protocol.rank_messages import TokenArrays
from engine.session.folder import Session

SAMPLE_ORDERS = ("step", "score", "kl", "length")
COLUMNS = """step, idx, attempt, prompt, response, score, kl, length, ended, parts"""
JUDGED = "SELECT attempt, step, idx, response, label, note, who, time FROM labels.judgements"
UNJUDGED = (
    "SELECT NULL AS attempt, NULL AS step, NULL AS idx, NULL AS response, NULL AS label, "
    "NULL AS note, NULL AS who, NULL AS time WHERE 0"
)
"""The same where nobody has judged yet."""
OTHERS = 200
"""Answers to one prompt that are read to be held against another one."""


class SampleQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which samples, and in what order; None does not limit."""

    order: str = "step"
    """One of SAMPLE_ORDERS."""
    descending: bool = True
    text: str = ""
    """Stands in the prompt or the response, whatever the case."""
    score_from: float | None = None
    score_to: float | None = None
    kl_from: float | None = None
    kl_to: float | None = None
    cut_off: bool = False
    """Only answers that did not end by themselves."""
    labels: str = ""
    """Only answers with one of these labels, with spaces between."""
    judged: bool | None = None
    """Only answers with a label or a note; False: only those with neither."""


class SampleReader:
    """The responses of a session; a session that has none reads as empty."""

    def __init__(self, session: Session) -> None:
        """Opens the samples; the judgements once they are asked for.

        Raises:
            JournalError: they cannot be read, or a newer version wrote them.
        """
        self.session = session
        self._db = ReadOnlyDatabase(session.samples_file, schema.SAMPLES)
        self._judged = False
        """Whether labels.db is attached: nobody may have judged yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def newest(self, last: int | None = None) -> list[SampleRow]:
        """The last samples of the current timeline, oldest first, without judgements."""
        rows = self._db.rows(
            f"SELECT {COLUMNS} FROM samples ORDER BY step DESC, idx DESC LIMIT ?",  # noqa: S608 - ours
            (limit(last),),
        )
        return [_sample(row) for row in reversed(rows)]

    def page(self, query: SampleQuery, limit: int, offset: int = 0) -> list[SampleRow]:
        """A page of the current timeline's samples, as they are asked for, with judgements."""
        # Column and direction come from fixed sets, never from what somebody typed.
        order = query.order if query.order in SAMPLE_ORDERS else "step"
        way = "DESC" if query.descending else "ASC"
        rows = self._judged_rows(
            f"SELECT {COLUMNS}, label, note, who, time "  # noqa: S608
            "FROM samples LEFT JOIN judged USING (attempt, step, idx, response) "
            "WHERE (:text = '' OR instr(lower(prompt), lower(:text)) "
            "OR instr(lower(response), lower(:text))) "
            "AND (:score_from IS NULL OR score >= :score_from) "
            "AND (:score_to IS NULL OR score <= :score_to) "
            "AND (:kl_from IS NULL OR kl >= :kl_from) AND (:kl_to IS NULL OR kl <= :kl_to) "
            "AND (NOT :cut_off OR NOT ended) "
            "AND (:labels = '' OR instr(:labels, label)) "
            "AND (:judged IS NULL OR :judged = (who IS NOT NULL)) "
            f"ORDER BY {order} {way}, step DESC, idx LIMIT :limit OFFSET :offset",
            msgspec.structs.asdict(query) | {"limit": limit, "offset": offset},
        )
        return [_sample(row) for row in rows]

    def earlier(self, sample: SampleRow) -> list[SampleRow]:
        """Other responses to the same prompt, up to the same step, newest first, with judgements.

        The others of a group of its step are among them, and those of timelines that were left
        (`left` says which).
        """
        given = {name: getattr(sample, name) for name in ("attempt", "step", "index", "prompt")}
        found: list[SampleRow] = []
        for table in ("samples", "samples_past"):
            rows = self._judged_rows(
                f"SELECT {COLUMNS}, label, note, who, time "  # noqa: S608 - one of two names
                f"FROM {table} LEFT JOIN judged USING (attempt, step, idx, response) "
                "WHERE prompt = :prompt AND (attempt, step) <= (:attempt, :step) "
                "AND NOT (attempt = :attempt AND step = :step AND idx = :index) "
                "ORDER BY attempt DESC, step DESC, idx LIMIT :limit",
                given | {"limit": OTHERS},
            )
            found += [_sample(row, left=table == "samples_past") for row in rows]
        found.sort(key=lambda s: (-s.attempt, -s.step, s.index))
        return found[:OTHERS]

    def _judged_rows(self, query: str, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        if self._db.connection is not None and not self._judged:
            self._judged = attach(self._db.connection, self.session)
        judged = f"WITH judged AS ({JUDGED if self._judged else UNJUDGED}) "
        return self._db.rows(judged + query, values)

    def arrays(self, step: int, index: int, attempt: int) -> TokenArrays | None:
        """The per-token arrays of one sample of the current timeline, where they were kept."""
        rows = self._db.rows(
            "SELECT data FROM arrays JOIN samples USING (step, idx) "
            "WHERE step = ? AND idx = ? AND attempt = ?",
            (step, index, attempt),
        )
        return msgspec.msgpack.decode(rows[0][0], type=TokenArrays) if rows else None


def _sample(row: tuple[Any, ...], *, left: bool = False) -> SampleRow:
    """From COLUMNS and, where judgements were asked for, label, note, who and time."""
    step, index, attempt, prompt, response, score, kl, length, ended, parts, *judged = row
    judgement = None
    if judged and judged[2] is not None:
        label, note, who, time = judged
        judgement = Judgement(label=label, note=note, who=who, time=time)
    return SampleRow(
        step=step, index=index, attempt=attempt, prompt=prompt, response=response, score=score,
        kl=kl, length=length, ended=bool(ended), parts=json.loads(parts), judgement=judgement,
        left=left,
    )  # fmt: skip


def with_judgements(session: Session, samples: Iterable[SampleRow]) -> list[SampleRow]:
    """Samples with the judgements on their words. Raises JournalError."""
    with LabelReader(session) as labels:
        known = labels.judgements()
    found = []
    for sample in samples:
        judged = known.get((sample.attempt, sample.step, sample.index))
        same = judged is not None and judged.answer.response == sample.response
        judgement = judged.judgement if judged is not None and same else None
        found.append(msgspec.structs.replace(sample, judgement=judgement))
    return found
