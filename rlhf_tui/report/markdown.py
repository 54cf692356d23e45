"""A report as one Markdown file, for pull requests, wikis and notebooks.

Curves are lines of blocks, because viewers remove inline pictures. Text of the session is inert:
prompts and responses are in fences that they cannot close, and all other text has its markup
escaped.
"""

import re
from collections.abc import Sequence

from engine import __version__
from engine.journal.rows import SampleRow
from rlhf_tui.format import clock, number, plural
from rlhf_tui.report import sections
from rlhf_tui.report.curves import Curve, Point
from rlhf_tui.report.data import Report
from rlhf_tui.report.sections import MAX_TEXT, TableData, cut, sample_heading
from rlhf_tui.state.runs.listing import spark
from rlhf_tui.text import one_line, sanitise

SPARK_WIDTH = 40
"""Blocks of a curve."""
_MARKUP = re.compile(
    r"[\\`*\[\]|~$]"
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # inside a word it is no emphasis
    r"|:(?=//)|(?<=www)\.",  # links without brackets
    re.IGNORECASE,
)
"""Markup within a line. No text of the session begins a line, so `#` and `-` need no escape."""
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;"})


def page(report: Report) -> str:
    """The whole page."""
    made = f"{clock(report.made)}, rlhf-tui {__version__}"
    parts = [f"# {text(report.name)}\n\nReport of {text(made)}\n"]
    parts += [f"## {heading}\n\n{body}" for heading, body in _parts(report) if body]
    return "\n".join(parts)


def text(value: str) -> str:
    """Text of the session on one line, inert in Markdown and in the HTML that it becomes."""
    return _MARKUP.sub(r"\\\g<0>", one_line(value).translate(_ENTITIES))


def fenced(value: str) -> str:
    """Text of the session as a block; the fence is longer than any run of backticks in it."""
    shown = sanitise(cut(value, MAX_TEXT))
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}\n"


def response(value: str, replies: Sequence[tuple[int, int]] | None) -> str:
    """A response as blocks, each reply of an environment in a quotation."""
    return "\n".join(
        re.sub("^", "> ", fenced(turn.text.strip()).rstrip("\n"), flags=re.MULTILINE) + "\n"
        if turn.is_reply
        else fenced(turn.text)
        for turn in sections.cut_turns(value, replies)
    )


def table(data: TableData) -> str:
    """A table of pipes; empty without rows."""
    if not data.rows:
        return ""
    lines = [_line(data.header), _line(["---"] * len(data.header), escaped=True)]
    lines += [_line(row) for row in data.rows]
    if data.left_out:
        lines.append(f"\n{plural(data.left_out, 'row')} left out.")
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str], *, escaped: bool = False) -> str:
    return f"| {' | '.join(cell if escaped else text(cell) for cell in cells)} |"


def _parts(report: Report) -> list[tuple[str, str]]:
    interventions = table(sections.interventions(report))
    if interventions:
        interventions = f"{sections.EFFECTS}\n\n{interventions}"
    return [
        ("Summary", _summary(report)),
        ("Comparison", _comparison(report)),
        ("Curves", _curves(report.curves)),
        ("Interventions", interventions),
        ("Alerts", table(sections.alerts(report))),
        ("Configuration", _configuration(report)),
        ("Samples", _samples(report)),
        ("Judgements", _judgements(report)),
        ("Checkpoints", table(sections.checkpoints(report))),
        ("Timeline", table(sections.events(report))),
    ]


def _summary(report: Report) -> str:
    facts = "\n".join(f"- {name}: {text(value)}" for name, value in sections.summary(report))
    held_out = table(sections.evaluations(report.held_out))
    if held_out:
        held_out = f"\nOn held-out prompts:\n\n{held_out}"
    return f"{facts}\n\n{table(sections.means(report.headlines))}{held_out}"


def _comparison(report: Report) -> str:
    tables = (sections.compared_metrics(report), sections.compared_settings(report))
    return "\n".join(table(data) for data in tables if data.rows)


def _curves(curves: Sequence[Curve]) -> str:
    rows = []
    for curve in curves:
        rows.append(_curve_row(curve.title, curve.points))
        if curve.other:
            rows.append(_curve_row("(the other run)", curve.other))
    return table(TableData(["metric", "curve", "first", "least", "greatest", "last"], rows))


def _curve_row(title: str, points: Sequence[Point]) -> list[str]:
    values = [value for _, value in points]
    ends = (values[0], min(values), max(values), values[-1])
    return [title, spark(values, SPARK_WIDTH), *map(number, ends)]


def _configuration(report: Report) -> str:
    changed = table(sections.changed_settings(report))
    others = table(sections.other_settings(report))
    return (
        f"These keys differ from the defaults.\n\n{changed}\n"
        f"<details><summary>All other keys</summary>\n\n{others}\n</details>\n"
    )


def _samples(report: Report) -> str:
    samples = report.samples
    parts = [f"{sections.REPLIES}\n"] if sections.has_replies(report) else []
    if samples.held_out:
        parts.append("### Held-out prompts over time\n")
    for rows in samples.held_out:
        parts += ["Prompt:\n", fenced(rows[0].prompt)]
        for row in rows:
            parts += [f"{text(sample_heading(row))}\n", response(row.response, row.replies)]
    parts += _titled("Through time", samples.through_time)
    parts += _titled("Highest scores", samples.best)
    parts += _titled("Lowest scores", samples.worst)
    return "\n".join(parts)


def _titled(title: str, rows: Sequence[SampleRow]) -> list[str]:
    parts = [f"### {title}\n"] if rows else []
    for row in rows:
        parts += [
            f"{text(sample_heading(row))}\n", fenced(row.prompt),
            response(row.response, row.replies),
        ]  # fmt: skip
    return parts


def _judgements(report: Report) -> str:
    samples = report.samples
    if not samples.judged and not samples.preferences:
        return ""
    parts = [f"{sections.judgements(report)}\n", table(sections.labels(report))]
    parts += _titled("Latest judged responses", samples.judged)
    if samples.preferences:
        parts.append("### Latest preferences\n")
    replies = samples.replies
    for pair in samples.preferences:
        parts += [f"by {text(sections.judge(pair.who))}\n", fenced(pair.prompt), "chosen:\n",
                  response(pair.chosen.response, replies.get(pair.chosen)), "rejected:\n",
                  response(pair.rejected.response, replies.get(pair.rejected))]  # fmt: skip
    return "\n".join(parts)
