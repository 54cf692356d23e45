"""Reads the recorded responses (samples.db) together with their judgements (labels.db)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import msgspec

from engine.errors import JournalError
from engine.examined import examined
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.journal.history.views import sample_views, views_of
from engine.journal.json_values import decoded
from engine.journal.judgements.labels import LabelReader, Response, attach
from engine.journal.rows import Judgement, SampleRow
from engine.protocol.rank_messages import SampleMessages, TokenArrays
from engine.session.folder import SessionFolder

SAMPLE_ORDERS = ("step", "score", "kl", "length")
JUDGEMENTS = "SELECT attempt, step, idx, response, label, note, who, time FROM labels.judgements"
NO_JUDGEMENTS = (
    "SELECT NULL AS attempt, NULL AS step, NULL AS idx, NULL AS response, NULL AS label, "
    "NULL AS note, NULL AS who, NULL AS time WHERE 0"
)
"""An empty table with the same columns, for a session without judgements."""
MATCHING = """
LEFT JOIN judged USING (attempt, step, idx, response)
WHERE (:prompt IS NULL OR prompt = :prompt)
AND (:text = '' OR instr(lower(prompt), lower(:text)) OR instr(lower(response), lower(:text)))
AND (:score_from IS NULL OR score >= :score_from) AND (:score_to IS NULL OR score <= :score_to)
AND (:kl_from IS NULL OR kl >= :kl_from) AND (:kl_to IS NULL OR kl <= :kl_to)
AND (NOT :cut_off OR NOT ended)
AND (:labels = '' OR instr(:labels, label))
AND (:judged IS NULL OR :judged = (who IS NOT NULL))
"""
"""The samples that match a :class:`SampleQuery`."""
JUDGED_KEYS = """
SELECT attempt, step, idx, response FROM labels.judgements
UNION SELECT chosen_attempt, chosen_step, chosen_idx, chosen FROM labels.preferences
UNION SELECT rejected_attempt, rejected_step, rejected_idx, rejected FROM labels.preferences
"""
"""The responses with a judgement or in a preference. Responses of the reference have no key, so no
sample matches them."""
NEWEST_KEYS = "SELECT step, idx, attempt FROM samples ORDER BY step DESC, idx DESC LIMIT ? OFFSET ?"
PAGE_SIZE = 1000
"""Number of samples that :meth:`SampleReader.iter_newest` reads at a time."""
MAX_COMPARED = 200
"""Maximum number of other responses to a prompt that :meth:`SampleReader.earlier` returns."""


class SampleQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Filter and order of samples. A filter that is None does not apply."""

    order: str = "step"
    """One of SAMPLE_ORDERS."""
    descending: bool = True
    prompt: str | None = None
    """Only responses to exactly this prompt."""
    text: str = ""
    """Text in the prompt or the response, ignoring case."""
    score_from: float | None = None
    score_to: float | None = None
    kl_from: float | None = None
    kl_to: float | None = None
    cut_off: bool = False
    """Only truncated responses."""
    labels: str = ""
    """Only responses with one of these labels, separated by spaces."""
    judged: bool | None = None
    """Only responses with a judgement (True), or only those without (False)."""
    held_out: bool = False
    """Responses to held-out prompts, which have no judgements, instead of training responses."""


class SampleReader:
    """Reads the responses of a session. A session without responses reads as empty."""

    def __init__(self, session: SessionFolder) -> None:
        """Opens samples.db. Judgements are opened when they are first read.

        Raises:
            JournalError: the file cannot be read, or a newer version wrote it.
        """
        self.session = session
        self._db = ReadOnlyDatabase(
            session.samples_file, schema.SAMPLES, views_of(session, sample_views)
        )
        self._labels_attached = False
        """False as long as there is no labels.db."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def newest(self, last: int | None = None) -> list[SampleRow]:
        """The rows of :meth:`iter_newest`."""
        return list(self.iter_newest(last))

    def iter_newest(self, last: int | None = None) -> Iterator[SampleRow]:
        """The last samples of the current timeline, oldest first, without their judgements.

        Reads :data:`PAGE_SIZE` of them at a time, so that not all have to be in memory. Those that
        are recorded meanwhile are left out.

        Args:
            last: maximum number of samples; None for all.
        """
        newest = self._db.rows(NEWEST_KEYS, (1, 0))
        if not newest or last == 0:
            return
        last_step, _, last_attempt = newest[0]
        oldest = [] if last is None else self._db.rows(NEWEST_KEYS, (1, last - 1))
        step, index, _ = oldest[0] if oldest else (-1, -1, 0)
        while True:
            # A later attempt has replaced steps after a roll back meanwhile.
            rows = self._db.rows(
                f"SELECT {self._columns} FROM samples WHERE (step, idx) >= (?, ?) "  # noqa: S608 - constants
                "AND step <= ? AND attempt <= ? ORDER BY step, idx LIMIT ?",
                (step, index, last_step, last_attempt, PAGE_SIZE),
            )
            yield from map(_sample, rows)
            if len(rows) < PAGE_SIZE:
                return
            step, index = rows[-1][0], rows[-1][1] + 1

    def of_step(self, step: int) -> list[SampleRow]:
        """The samples of a step of the current timeline, by index, without their judgements."""
        rows = self._db.rows(
            f"SELECT {self._columns} FROM samples WHERE step = ? ORDER BY idx",  # noqa: S608 - constants
            (step,),
        )
        return [_sample(row) for row in rows]

    def newest_step(self, *, held_out: bool = False) -> int:
        """The last step with samples, or with responses to held-out prompts; 0 without any."""
        if held_out and not self._keeps_evaluated:
            return 0
        table = _table(held_out=held_out)
        return self._db.value(f"SELECT max(step) FROM {table}") or 0  # noqa: S608 - one of two names

    @property
    def _columns(self) -> str:
        """SAMPLE_COLUMNS, with replacements for those that an older file lacks."""
        return schema.sample_columns(self._db.version, missing=", NULL AS {}")

    @property
    def _keeps_evaluated(self) -> bool:
        return self._db.version >= schema.EVALUATED_ARE_KEPT

    def page(
        self, query: SampleQuery, limit: int, offset: int = 0, *, last_step: int | None = None
    ) -> list[SampleRow]:
        """One page of the samples of the current timeline that match a query, with judgements.

        Args:
            query: filter and order.
            limit: maximum number of samples.
            offset: matching samples before the page.
            last_step: return no samples of later steps. With a fixed step, the pages of a live run
                do not shift while it records more.
        """
        # Column and direction come from fixed sets, never from user input.
        order = query.order if query.order in SAMPLE_ORDERS else "step"
        direction = "DESC" if query.descending else "ASC"
        # With "+" SQLite does not search the index for the step, which all rows pass as a rule.
        within = "" if last_step is None else "AND +step <= :last_step "
        rows = self._matching(
            query,
            f"{self._columns}, label, note, who, time",
            f"{within}ORDER BY {order} {direction}, step DESC, idx LIMIT :limit OFFSET :offset",
            {"limit": limit, "offset": offset, "last_step": last_step},
        )
        return [_sample(row, held_out=query.held_out) for row in rows]

    def count_after(self, query: SampleQuery, step: int, last_step: int | None = None) -> int:
        """The number of samples of the current timeline after a step that match a query.

        Args:
            query: the filter.
            step: count samples of later steps.
            last_step: count no samples of later steps than this one.
        """
        condition = "AND step > :step AND (:last_step IS NULL OR step <= :last_step)"
        values = {"step": step, "last_step": last_step}
        rows = self._matching(query, "count(*)", condition, values)
        return rows[0][0] if rows else 0

    def _matching(
        self, query: SampleQuery, columns: str, rest: str, values: Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        """Selects columns of the samples that match a query; `rest`: more conditions, the order."""
        if query.held_out and not self._keeps_evaluated:
            return []
        return self._judged_rows(
            f"SELECT {columns} FROM {_table(held_out=query.held_out)} {MATCHING} {rest}",  # noqa: S608 - constants
            msgspec.structs.asdict(query) | dict(values),
            held_out=query.held_out,
        )

    def earlier(self, sample: SampleRow) -> list[SampleRow]:
        """Other responses to the same prompt, up to the same step, newest first, with judgements.

        They include other responses of the same step, and responses of abandoned branches, which
        have `left` set. At most :data:`MAX_COMPARED`. For a response to a held-out prompt, they are
        those with the same index, which were sampled with the same random numbers.
        """
        values = {name: getattr(sample, name) for name in ("attempt", "step", "index", "prompt")}
        samples: list[SampleRow] = []
        current = _table(held_out=sample.held_out)
        same = "AND idx = :index " if sample.held_out else ""
        for table, left in ((current, False), (f"{current}_past", True)):
            rows = self._judged_rows(
                f"SELECT {self._columns}, label, note, who, time "  # noqa: S608 - constants
                f"FROM {table} LEFT JOIN judged USING (attempt, step, idx, response) "
                "WHERE prompt = :prompt AND (attempt, step) <= (:attempt, :step) "
                f"AND NOT (attempt = :attempt AND step = :step AND idx = :index) {same}"
                "ORDER BY attempt DESC, step DESC, idx LIMIT :limit",
                values | {"limit": MAX_COMPARED},
                held_out=sample.held_out,
            )
            samples += [_sample(row, left=left, held_out=sample.held_out) for row in rows]
        samples.sort(key=lambda s: (-s.attempt, -s.step, s.index))
        return samples[:MAX_COMPARED]

    def evaluated(self, step: int | None = None) -> list[SampleRow]:
        """Responses to held-out prompts, by step and index; by default of all evaluations."""
        if not self._keeps_evaluated:
            return []
        rows = self._db.rows(
            f"SELECT {self._columns} FROM evaluated WHERE :step IS NULL OR step = :step "  # noqa: S608 - constants
            "ORDER BY step, idx",
            {"step": step},
        )
        return [_sample(row, held_out=True) for row in rows]

    def _judged_rows(
        self, query: str, values: Mapping[str, Any], *, held_out: bool
    ) -> list[tuple[Any, ...]]:
        """Runs a query that reads `judged`, which is empty for responses to held-out prompts."""
        judgements = JUDGEMENTS if self._attach_labels() and not held_out else NO_JUDGEMENTS
        if judgements is JUDGEMENTS and (position := self.session.position) is not None:
            judgements = f"{JUDGEMENTS} WHERE time <= {position.time!r}"
        return self._db.rows(f"WITH judged AS ({judgements}) {query}", values)

    def judged(self) -> list[SampleRow]:
        """The responses with a judgement or in a preference, including abandoned branches."""
        if not self._attach_labels():
            return []
        found = []
        for table, left in (("samples", False), ("samples_past", True)):
            rows = self._judged_rows(
                f"SELECT {self._columns}, label, note, who, time "  # noqa: S608 - constants
                f"FROM ({JUDGED_KEYS}) CROSS JOIN {table} USING (attempt, step, idx, response) "
                "LEFT JOIN judged USING (attempt, step, idx, response) ORDER BY step, idx",
                {},
                held_out=False,
            )
            found += [_sample(row, left=left) for row in rows]
        return found

    def replies_of_judged(self) -> dict[Response, list[tuple[int, int]]]:
        """The replies in the responses of :meth:`judged` that had an environment."""
        return {Response.of(row): row.replies for row in self.judged() if row.replies is not None}

    def _attach_labels(self) -> bool:
        """Attaches `labels.db` once it exists; returns whether it is attached."""
        if self._db.connection is not None and not self._labels_attached:
            self._labels_attached = attach(self._db.connection, self.session)
        return self._labels_attached

    def arrays(self, step: int, index: int, attempt: int) -> TokenArrays | None:
        """The per-token arrays of a sample of the current timeline; None if not recorded."""
        data = self._db.value(
            "SELECT data FROM arrays JOIN samples USING (step, idx) "
            "WHERE step = ? AND idx = ? AND attempt = ?",
            (step, index, attempt),
        )
        return None if data is None else _arrays(data)

    def with_arrays(self, step: int, attempt: int) -> list[int]:
        """The indices of the samples of a step that were recorded with per-token arrays."""
        rows = self._db.rows(
            "SELECT idx FROM arrays JOIN samples USING (step, idx) "
            "WHERE step = ? AND attempt = ? ORDER BY idx",
            (step, attempt),
        )
        return [index for (index,) in rows]


def _arrays(data: bytes) -> TokenArrays:
    try:
        return msgspec.msgpack.decode(data, type=examined(TokenArrays))
    except (msgspec.DecodeError, TypeError, UnicodeError) as error:
        text = f"samples.db is damaged, per-token values cannot be read: {error}"
        raise JournalError(text) from error


def _table(*, held_out: bool) -> str:
    return "evaluated" if held_out else "samples"


def _sample(row: tuple[Any, ...], *, left: bool = False, held_out: bool = False) -> SampleRow:
    """Builds a row from `SAMPLE_COLUMNS`, optionally followed by label, note, who and time."""
    (
        step, index, attempt, prompt, response, score, kl, length, ended, parts, version, replies,
        messages, turn_scores, *judged,
    ) = row  # fmt: skip
    judgement = None
    if judged and judged[2] is not None:
        label, note, who, time = judged
        judgement = Judgement(label=label, note=note, who=who, time=time)
    return SampleRow(
        step=step, index=index, attempt=attempt, prompt=prompt, response=response, score=score,
        kl=kl, length=length, ended=bool(ended), parts=decoded(parts, dict[str, float | None]),
        weights_version=version,
        replies=None if replies is None else decoded(replies, list[tuple[int, int]]),
        messages=None if messages is None else decoded(messages, SampleMessages),
        turn_scores={} if turn_scores is None else decoded(turn_scores, dict[str, list[float]]),
        judgement=judgement, left=left, held_out=held_out,
    )  # fmt: skip


def with_judgements(session: SessionFolder, samples: Iterable[SampleRow]) -> Iterator[SampleRow]:
    """Adds judgements to samples. Raises JournalError.

    A judgement of another response under the same key is ignored: samples.db was replaced.
    """
    with LabelReader(session) as labels:
        judgements = labels.judgements()
    for sample in samples:
        match = judgements.get((sample.attempt, sample.step, sample.index))
        same = match is not None and match.response.response == sample.response
        judgement = match.judgement if match is not None and same else None
        yield msgspec.structs.replace(sample, judgement=judgement)
