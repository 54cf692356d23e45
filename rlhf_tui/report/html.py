"""A report as one HTML file, without scripts and without anything to load.

All text of the session is sanitised and escaped. As a second line of defence, the page's content
security policy forbids scripts and every request.
"""

from collections.abc import Sequence
from html import escape

from engine import __version__
from engine.journal.rows import SampleRow
from rlhf_tui.format import clock, plural
from rlhf_tui.report import sections
from rlhf_tui.report.data import Report
from rlhf_tui.report.sections import MAX_TEXT, TableData, cut, sample_heading
from rlhf_tui.report.style import STYLE
from rlhf_tui.report.svg import chart
from rlhf_tui.text import sanitise

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
LEGEND = (
    "Dashed lines with a number are interventions, listed below; dotted lines are starts; "
    "triangles are alerts; grey curves are abandoned branches. The strong line is a moving average."
)


def page(report: Report) -> str:
    """The whole page."""
    title = f"{report.name}: report"
    body = [part for part in _parts(report) if part[2]]
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in body)
    made = f"{clock(report.made)}, rlhf-tui {__version__}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            f'content="{escape(CONTENT_SECURITY_POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{text(report.name)}</h1>",
            f'<p class="dim">Report of {text(made)}</p>',
            f"<nav>{links}</nav></header>",
            "<main>",
            *(f'<section id="{key}"><h2>{head}</h2>\n{html}</section>' for key, head, html in body),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def text(value: str) -> str:
    """Text of the session, inert in HTML: sanitised and escaped."""
    return escape(sanitise(value))


def _parts(report: Report) -> list[tuple[str, str, str]]:
    """Id, heading and HTML of each section; empty HTML for one without content."""
    interventions = table(sections.interventions(report))
    if interventions:
        interventions = f'<p class="dim">{sections.EFFECTS}</p>{interventions}'
    return [
        ("summary", "Summary", _summary(report)),
        ("comparison", "Comparison", _comparison(report)),
        ("curves", "Curves", _charts(report)),
        ("interventions", "Interventions", interventions),
        ("alerts", "Alerts", table(sections.alerts(report))),
        ("configuration", "Configuration", _configuration(report)),
        ("samples", "Samples", _samples(report)),
        ("judgements", "Judgements", _judgements(report)),
        ("checkpoints", "Checkpoints", table(sections.checkpoints(report))),
        ("timeline", "Timeline", table(sections.events(report))),
    ]


def _summary(report: Report) -> str:
    facts = "".join(
        f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in sections.summary(report)
    )
    held_out = table(sections.evaluations(report.held_out))
    if held_out:
        held_out = f"<h3>On held-out prompts</h3>{held_out}"
    return f"<dl>{facts}</dl>{table(sections.means(report.headlines))}{held_out}"


def _comparison(report: Report) -> str:
    metrics, settings = sections.compared_metrics(report), sections.compared_settings(report)
    return f"{table(metrics)}{table(settings)}" if metrics.rows else ""


def table(data: TableData) -> str:
    """A table that scrolls within the page; empty without rows."""
    if not data.rows:
        return ""
    head = "".join(f"<th>{text(cell)}</th>" for cell in data.header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in data.rows
    )
    note = ""
    if data.left_out:
        note = f'<p class="left-out">{plural(data.left_out, "row")} left out.</p>'
    return f'<div class="scroll"><table><tr>{head}</tr>\n{rows}</table></div>{note}\n'


def _charts(report: Report) -> str:
    if not report.curves:
        return ""
    marks = sections.marks(report)
    figures = "\n".join(
        f"<figure><figcaption>{text(curve.title)}</figcaption>\n"
        f"{chart(curve, marks, report.step)}</figure>"
        for curve in report.curves
    )
    other = ""
    if report.comparison is not None:
        other = f' <span class="compared">{text(report.comparison.name)}</span> is orange.'
    return f'<p class="dim">{LEGEND}{other}</p><div class="charts">{figures}</div>'


def _configuration(report: Report) -> str:
    others = table(sections.other_settings(report))
    return (
        f"<p>These keys differ from the defaults.</p>{table(sections.changed_settings(report))}"
        f"<details><summary>All other keys</summary>{others}</details>"
    )


def _samples(report: Report) -> str:
    samples = report.samples
    parts = [f'<p class="dim">{sections.REPLIES}</p>'] if sections.has_replies(report) else []
    if samples.held_out:
        parts.append("<h3>Held-out prompts over time</h3>")
        parts += [_group(rows) for rows in samples.held_out]
    parts += _titled("Through time", samples.through_time)
    parts += _titled("Highest scores", samples.best)
    parts += _titled("Lowest scores", samples.worst)
    return "\n".join(parts)


def _titled(title: str, rows: Sequence[SampleRow]) -> list[str]:
    return [f"<h3>{title}</h3>", *map(sample, rows)] if rows else []


def _group(rows: Sequence[SampleRow]) -> str:
    """The responses to one prompt, which is shown once."""
    responses = "".join(
        f"<p>{text(sample_heading(row))}</p>{_response(row.response, row.replies)}" for row in rows
    )
    return f'<div class="sample"><pre class="prompt">{_long(rows[0].prompt)}</pre>{responses}</div>'


def sample(row: SampleRow) -> str:
    """One prompt and its response."""
    return (
        f'<div class="sample"><p>{text(sample_heading(row))}</p>'
        f'<pre class="prompt">{_long(row.prompt)}</pre>{_response(row.response, row.replies)}</div>'
    )


def _response(response: str, replies: Sequence[tuple[int, int]] | None) -> str:
    """A response, each reply of an environment in a block of its own."""
    return "".join(
        f'<pre class="reply">{text(turn.text.strip())}</pre>'
        if turn.is_reply
        else f"<pre>{text(turn.text)}</pre>"
        for turn in sections.cut_turns(response, replies)
    )


def _long(value: str) -> str:
    return text(cut(value, MAX_TEXT))


def _judgements(report: Report) -> str:
    samples = report.samples
    if not samples.judged and not samples.preferences:
        return ""
    parts = [f"<p>{text(sections.judgements(report))}</p>", table(sections.labels(report))]
    parts += _titled("Latest judged responses", samples.judged)
    if samples.preferences:
        parts.append("<h3>Latest preferences</h3>")
    replies = samples.replies
    for pair in samples.preferences:
        parts.append(
            f'<div class="sample"><p>by {text(sections.judge(pair.who))}</p>'
            f'<pre class="prompt">{_long(pair.prompt)}</pre><p>chosen</p>'
            f"{_response(pair.chosen.response, replies.get(pair.chosen))}<p>rejected</p>"
            f"{_response(pair.rejected.response, replies.get(pair.rejected))}</div>"
        )
    return "\n".join(parts)
