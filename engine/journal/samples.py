"""What the policy wrote, with what the operators think of it: samples.db beside labels.db."""

import json

import msgspec

from engine.journal import schema
from engine.journal.database import DatabaseReader, Row, limit
from engine.journal.labels import attach
from engine.protocol.rank_messages import TokenArrays
from engine.session.folder import Session

SAMPLE_ORDERS = ("step", "score", "kl", "length")
COLUMNS = """step, idx AS 'index', attempt, prompt, response, score, kl, length, ended, parts"""
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


class SampleReader(DatabaseReader):
    """The answers of a session."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._samples = self._opened(session.samples_file, schema.SAMPLES)
        self._judged = False

    def samples(self, last: int | None = None) -> list[Row]:
        """Samples of the current timeline, oldest first."""
        rows = self._rows(
            self._samples,
            f"SELECT {COLUMNS} FROM samples ORDER BY step DESC, idx DESC LIMIT ?",  # noqa: S608 - ours
            (limit(last),),
        )
        return [_decoded(row) for row in rows[::-1]]

    def sample_page(self, query: SampleQuery, limit: int, offset: int = 0) -> list[Row]:
        """A page of the current timeline's samples, as they are asked for.

        Each with what is thought of it: `label`, `note`, `who` and `time`, None where nothing is.
        """
        # Column and direction come from fixed sets, never from what somebody typed.
        order = query.order if query.order in SAMPLE_ORDERS else "step"
        way = "DESC" if query.descending else "ASC"
        return self._judged_rows(
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

    def earlier(self, answer: Row) -> list[Row]:
        """Other answers to the same prompt, up to the same step, newest first, with their labels.

        The others of a group of its step are among them, and those of timelines that were left
        (`left` says which).
        """
        given = {name: answer[name] for name in ("attempt", "step", "index", "prompt")}
        found: list[Row] = []
        for table in ("samples", "samples_past"):
            rows = self._judged_rows(
                f"SELECT {COLUMNS}, label, note, who, time "  # noqa: S608 - one of two names
                f"FROM {table} LEFT JOIN judged USING (attempt, step, idx, response) "
                "WHERE prompt = :prompt AND (attempt, step) <= (:attempt, :step) "
                "AND NOT (attempt = :attempt AND step = :step AND idx = :index) "
                "ORDER BY attempt DESC, step DESC, idx LIMIT :limit",
                given | {"limit": OTHERS},
            )
            found += [row | {"left": table == "samples_past"} for row in rows]
        found.sort(key=lambda row: (-row["attempt"], -row["step"], row["index"]))
        return found[:OTHERS]

    def _judged_rows(self, query: str, values: Row) -> list[Row]:
        if self._samples is not None and not self._judged:
            self._judged = attach(self._samples, self.session)
        judged = f"WITH judged AS ({JUDGED if self._judged else UNJUDGED}) "
        return [_decoded(row) for row in self._rows(self._samples, judged + query, values)]

    def arrays(self, step: int, index: int, attempt: int) -> TokenArrays | None:
        """The per-token arrays of one sample of the current timeline, where they were kept."""
        rows = self._all(
            self._samples,
            "SELECT data FROM arrays JOIN samples USING (step, idx) "
            "WHERE step = ? AND idx = ? AND attempt = ?",
            (step, index, attempt),
        )
        return msgspec.msgpack.decode(rows[0][0], type=TokenArrays) if rows else None


def _decoded(row: Row) -> Row:
    row["parts"] = json.loads(row["parts"])
    row["ended"] = bool(row["ended"])
    return row
