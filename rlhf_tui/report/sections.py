"""Common to both forms of a report: the words, the rows of its tables, and their limits."""

from collections.abc import Sequence

from msgspec import Struct

from engine.agreement import Agreement, interval
from engine.journal.rows import SampleRow
from engine.journal.turns import Turn, turns_of
from engine.metrics import SCORE, title_of
from rlhf_tui.format import clock, duration, number, plural, size, with_interval
from rlhf_tui.report.data import Report
from rlhf_tui.report.headlines import Headline
from rlhf_tui.report.interventions import COMPARED_METRICS, Intervention
from rlhf_tui.report.settings import Setting
from rlhf_tui.report.svg import Mark
from rlhf_tui.state.timeline import Marker, sender

MAX_ROWS = 150
"""Rows of a table; of more, the first third and the latest."""
MAX_CELL = 200
"""Characters of a cell of a table."""
MAX_NAME = 40
MAX_TEXT = 1200
"""Characters of a prompt or a response. With these limits a page stays below 3 MB, whatever a
session holds."""
EFFECTS = "Metrics: mean over the ten steps before it → over the ten steps from it on."
REPLIES = "What the environment replied is set apart from the policy's words by a line on its left."
WORDS = {
    "attempt": "start", "command": "intervention", "alert": "alert", "note": "note",
    "crash": "failure", "end": "end",
}  # fmt: skip
"""Kind of a marker → its word; checkpoints have a section of their own."""


class TableData(Struct, frozen=True):
    """A table; the cells are not escaped yet."""

    header: list[str]
    rows: list[list[str]]
    left_out: int = 0
    """Rows that are not shown."""


def limited(header: list[str], rows: Sequence[list[str]]) -> TableData:
    """A table of at most :data:`MAX_ROWS` rows."""
    rows = [[cut(cell, MAX_CELL) for cell in row] for row in rows]
    left_out = max(0, len(rows) - MAX_ROWS)
    first = MAX_ROWS // 3
    shown = rows[:first] + rows[first + left_out :] if left_out else list(rows)
    return TableData(header, shown, left_out)


def cut(text: str, longest: int) -> str:
    """The text; what is longer ends with the number of characters that were cut off."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]}… ({len(text) - longest:,} more characters)"


def cut_turns(response: str, replies: Sequence[tuple[int, int]] | None) -> list[Turn]:
    """The turns of a response that is cut to :data:`MAX_TEXT`, without empty ones."""
    kept = response[:MAX_TEXT]
    turns = [turn for turn in turns_of(kept, replies) if turn.text] or [Turn("", False)]
    text, is_reply = turns[-1]
    left_out = cut(response, MAX_TEXT).removeprefix(kept)
    return [*turns[:-1], Turn(text + left_out, is_reply)]


def _state(state: str, reason: str) -> str:
    """`failed: out of memory`, or a reason that begins with the state: `stopped at once`."""
    if not reason:
        return state
    return cut(reason if reason.startswith(state) else f"{state}: {reason}", MAX_CELL)


def summary(report: Report) -> list[tuple[str, str]]:
    """The facts above everything else."""
    reason = report.meta.pause_reason or report.meta.message
    facts = [
        ("state", _state(report.state, reason or "")),
        ("steps", f"{report.step:,} of {report.total_steps:,}"),
    ]
    if report.first_time is not None:
        facts.append(("started", clock(report.first_time)))
        if report.last_time is not None:
            taken = duration(report.last_time - report.first_time)
            facts.append(("last step", f"{clock(report.last_time)}, {taken} after the start"))
    if report.forked_from is not None:
        source, step = report.forked_from
        facts.append(("forked from", f"{source} at step {step:,}"))
    facts.append(("attempts", str(len(report.attempts))))
    versions = dict.fromkeys(a.version for a in report.attempts)
    facts.append(("version", ", ".join(versions)))
    counts = [(len(report.interventions), "intervention"), (len(report.alerts), "alert"),
              (len(report.notes), "note")]  # fmt: skip
    facts.append(("happened", ", ".join(plural(n, noun) for n, noun in counts)))
    return facts


def means(headlines: Sequence[Headline]) -> TableData:
    """The main metrics of the training, means of the first and the last steps."""
    rows = [[h.title, number(h.first), number(h.last)] for h in headlines]
    return TableData(["metric", "first steps", "last steps"], rows)


def evaluations(headlines: Sequence[Headline]) -> TableData:
    """The evaluation on held-out prompts, at its first and last step."""
    return TableData(["metric", "first", "last"], [_held_out_row(h) for h in headlines])


def _held_out_row(headline: Headline) -> list[str]:
    first, last = headline.steps or (0, 0)
    around_first, around_last = headline.half_widths
    return [
        headline.title,
        f"{with_interval(headline.first, around_first, 3)} (step {first:,})",
        f"{with_interval(headline.last, around_last, 3)} (step {last:,})",
    ]


def _last(headline: Headline | None) -> str:
    return "–" if headline is None else with_interval(headline.last, headline.half_widths[1], 3)


def compared_metrics(report: Report) -> TableData:
    """The last values of both runs."""
    other = report.comparison
    if other is None:
        return TableData([], [])
    mine = {h.title: h for h in (*report.headlines, *report.held_out)}
    theirs = {h.title: h for h in (*other.headlines, *other.held_out)}
    rows = [
        [title, *(_last(run.get(title)) for run in (mine, theirs))]
        for title in dict.fromkeys([*mine, *theirs])
    ]
    steps = ["steps", f"{report.step:,}", f"{other.step:,}"]
    return limited(
        ["last values", report.name, other.name],
        [["state", report.state, other.state], steps, *rows],
    )


def compared_settings(report: Report) -> TableData:
    """The keys whose values differ between both runs."""
    other = report.comparison
    if other is None:
        return TableData([], [])
    rows = [[s.key, _value(s.value), _value(s.default)] for s in other.settings]
    return limited(["configuration", report.name, other.name], rows)


def changed_settings(report: Report) -> TableData:
    """The keys of the configuration that differ from the defaults."""
    return values_and_defaults([s for s in report.settings if s.differs])


def values_and_defaults(settings: Sequence[Setting]) -> TableData:
    """A row for each key."""
    rows = [[s.key, _value(s.value), _value(s.default)] for s in settings]
    return limited(["key", "value", "default"], rows)


def other_settings(report: Report) -> TableData:
    """The keys that have their default value."""
    rows = [[s.key, _value(s.value)] for s in report.settings if not s.differs]
    return TableData(["key", "value"], rows)


def _value(value: object) -> str:
    if value is None or value in ("", []):
        return "–"
    if isinstance(value, dict):  # a rule, a source, a webhook: as in the file, without empty keys
        given = ", ".join(f"{key}: {_value(v)}" for key, v in value.items() if v is not None)
        return f"{{{given}}}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def interventions(report: Report) -> TableData:
    """The interventions: what was changed, by whom, and the metrics before → after."""
    header = ["", "step", "who", "what", *map(title_of, COMPARED_METRICS), "notes"]
    return limited(header, [_intervention(i) for i in report.interventions])


def _intervention(intervention: Intervention) -> list[str]:
    marker = intervention.marker
    effects = [
        f"{number(e.before)}\u00a0→\u00a0{number(e.after)}"
        if (e := intervention.effects.get(name))
        else "–"
        for name in COMPARED_METRICS
    ]
    left = " (abandoned branch)" if marker.abandoned else ""
    notes = "; ".join(intervention.notes)
    who = sender(marker.who)
    return [str(intervention.number), f"{marker.step:,}", who, marker.text + left, *effects, notes]


def alerts(report: Report) -> TableData:
    """The alerts, oldest first."""
    return limited(["step", "time", "alert"], [_row(m) for m in report.alerts])


def events(report: Report) -> TableData:
    """The timeline, oldest first, without checkpoints."""
    shown = [m for m in report.markers if m.kind in WORDS]
    rows = [[*_row(m)[:2], WORDS[m.kind], sender(m.who), _row(m)[2]] for m in shown]
    return limited(["step", "time", "", "who", "what"], rows)


def _row(marker: Marker) -> list[str]:
    left = " (abandoned branch)" if marker.abandoned else ""
    return [f"{marker.step:,}", clock(marker.time), marker.text + left]


def checkpoints(report: Report) -> TableData:
    """The checkpoints; the best of those that exist is marked."""
    status = {"complete": "", "superseded": "abandoned branch", "removed": "deleted"}
    rows = [
        [
            f"{c.row.step:,}", clock(c.row.time), number(c.row.score), number(c.row.kl, 2),
            number(c.value), size(c.row.size),
            f"best {title_of(report.best_metric)}" if c.best else status.get(c.row.status, ""),
        ]
        for c in report.checkpoints
    ]  # fmt: skip
    header = ["step", "time", "score", "KL", title_of(report.best_metric), "size", ""]
    if report.best_metric == SCORE:  # the column of the score says the same
        header = [*header[:4], *header[5:]]
        rows = [[*row[:4], *row[5:]] for row in rows]
    return limited(header, rows)


def labels(report: Report) -> TableData:
    """The labels, with the mean score of their responses."""
    rows = [[c.label, str(c.count), number(c.mean_score)] for c in report.samples.labels]
    return TableData(["label", "responses", "mean score"], rows)


def has_replies(report: Report) -> bool:
    """Whether any response of the report has replies."""
    samples = report.samples
    groups = (*samples.held_out, samples.through_time, samples.best, samples.worst, samples.judged)
    shown = any(row.replies for rows in groups for row in rows)
    return shown or any(samples.replies.values())


def sample_heading(row: SampleRow) -> str:
    """`step 40 #3 · score 1.2 · KL 7.1 · 31 tokens · good: well put (ana)`."""
    parts = [
        f"step {row.step:,} #{row.index}", f"score {number(row.score)}",
        f"KL {number(row.kl, 2)}", plural(row.length, "token"),
    ]  # fmt: skip
    if row.replies is not None:
        parts.append(plural(len(row.replies) + 1, "turn"))
    if not row.ended:
        parts.append("cut off")
    if row.judgement is not None:
        said = ": ".join(cut(t, MAX_CELL) for t in (row.label, row.note) if t)
        parts.append(f"{said} ({judge(row.judgement.who)})")
    return " · ".join(parts)


def judge(who: str) -> str:
    """Who judged a response."""
    return cut(sender(who), MAX_NAME)


def marks(report: Report) -> list[Mark]:
    """The marks that charts draw, in the order of the steps."""
    found = [
        Mark(i.marker.step, str(i.number), f"{i.number}: {i.marker.text}", "intervention")
        for i in report.interventions
        if not i.marker.abandoned
    ]
    for marker in report.markers:
        if marker.kind in ("alert", "attempt") and not marker.abandoned and marker.step >= 1:
            alert = marker.kind == "alert"
            found.append(
                Mark(marker.step, "", "", "alert")
                if alert
                else Mark(marker.step, "", marker.text, "start")
            )
    return sorted(found, key=lambda m: m.step)


def judgements(report: Report) -> str:
    """How many there are, and how far the scores agree with them."""
    total = plural(report.samples.judged_total, "judged response")
    pairs = plural(report.samples.preferences_total, "preference")
    return f"{total}, {pairs}. {agreement(report.agreement)}".rstrip()


def agreement(found: Agreement) -> str:
    """How far scores agree with judgements, in one sentence; empty if there are none to compare."""
    if found.mean is None:
        return ""
    low, high = interval(found.mean, len(found.points))
    text = (
        f"The scores agree with {found.mean:.0%} of {plural(len(found.points), 'judgement')} "
        f"({low:.0%} to {high:.0%}; 50% is chance)"
    )
    if (fall := found.fall) is None:
        return f"{text}."
    return (
        f"{text}, and less from step {fall.step:,} on: {fall.before:.0%} before, "
        f"{fall.after:.0%} from then on."
    )
