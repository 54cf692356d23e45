"""The report: one page that is complete, small, and harmless whatever the model wrote."""

import math
import re
import shutil
import sqlite3
import xml.etree.ElementTree as ET
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import msgspec
import pytest
from click.testing import CliRunner

from engine.journal.judgements.labels import Response, prefer, set_label, set_note
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.journal.turns import Turn
from engine.journal.writer import JournalWriter
from engine.metrics import AGREEMENT, SCORE
from engine.protocol.rank_messages import Sample, StepReport
from engine.session.folder import SessionFolder, create
from rlhf_tui.cli import cli
from rlhf_tui.report import html, markdown
from rlhf_tui.report.curves import SPANS, Curve
from rlhf_tui.report.data import read_report
from rlhf_tui.report.headlines import read_headlines
from rlhf_tui.report.samples import spread
from rlhf_tui.report.sections import cut_turns
from rlhf_tui.report.settings import settings_of_run
from rlhf_tui.report.svg import Mark, chart, moving_mean, tick_label, ticks
from rlhf_tui.state.runs.listing import spark
from tests.tui.conftest import NOW, config_of

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)></pre></details>\x1b]52;c;ZXZpbA==\x07"
    "\x1b[2J```\n````\n# not a heading\n![x](http://evil.example/x.png) www.evil.example "
    "| a | b |\n<!--\u202e-->&lt;&#60;script>javascript:alert(3)\x00"
)
OLD = Path(__file__).parents[1] / "data" / "sessions-0.1.0" / "sessions"
MAX_BYTES = 3_000_000
VOID = {"meta", "circle", "path", "polyline", "br", "img"}


class Page(HTMLParser):
    """The elements and the text of a page; fails where elements do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report(root):
    return read_report(SessionFolder(root / "frozen"), lambda: NOW)


# -- what it shows ---------------------------------------------------------------------------------


def test_it_has_what_a_reader_asks_for(report):
    page = Page(html.page(report))
    for words in (
        "200 of 200", "finished", "beta 0.05 → 0.08", "target 6 → 8", "kl-runaway",
        "answers begin to repeat themselves", "kl.horizon", "says 'film' wherever it can",
        "best score", "engine died", "Lowest scores",
    ):  # fmt: skip
        assert words in page.text, words
        assert words in markdown.page(report), words
    headings = re.findall(r"<h2>(.*?)</h2>", html.page(report))
    assert headings == re.findall(r"^## (.*)$", markdown.page(report), re.MULTILINE)


def test_each_intervention_has_the_means_before_and_after_and_its_number_in_the_charts(
    report, root
):
    first, second = report.interventions
    assert (first.number, first.marker.step, second.number) == (1, 63, 2)
    with JournalReader(SessionFolder(root / "frozen")) as reader:
        values = dict(reader.metrics.series("objective/kl"))
    effect = first.effects["objective/kl"]
    assert effect.before == pytest.approx(sum(values[s] for s in range(53, 63)) / 10)
    assert effect.after == pytest.approx(sum(values[s] for s in range(63, 73)) / 10)
    picture = re.search("<svg.*?</svg>", html.page(report), re.DOTALL)[0]
    assert picture.count('class="intervention"') == 2
    assert "<title>1: beta 0.05 → 0.08</title>" in picture


def test_settings_that_differ_come_first_and_defaults_of_other_keys_are_defaults():
    settings = settings_of_run(config_of())
    differing = [s.key for s in settings if s.differs]
    assert [s.key for s in settings][: len(differing)] == differing
    assert {"model.policy", "kl.controller", "train.learning_rate"} <= set(differing)
    assert not {"rollout.per_prompt", "ppo.whiten", "eval.max_new_tokens"} & set(differing)
    rloo = {s.key: s for s in settings_of_run(config_of(**{"ppo.advantage": "rloo"}))}
    assert rloo["ppo.advantage"].differs
    assert not rloo["rollout.per_prompt"].differs
    assert set(rloo) >= {"lora.rank", "notify.command"}


def test_held_out_prompts_are_shown_at_several_steps(tmp_path):
    session = create(tmp_path / "s", "held", config_of())
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    journal.record_evaluation(0, {"eval/score": 0.5, "eval/score_ci": 0.1}, [said("at 0")])
    for step in range(1, 13):
        metrics = {"objective/scores": 1.0} | ({"eval/score": step / 10} if step % 2 == 0 else {})
        evaluated = [said(f"at {step}")] if step % 2 == 0 else []
        journal.record_step(
            StepReport(step=step, metrics=metrics, samples=[], settings={}, evaluated=evaluated)
        )
    journal.close()
    report = read_report(session)
    ((*rows,),) = report.samples.held_out
    assert [row.response for row in rows] == ["at 0", "at 4", "at 6", "at 8", "at 12"]
    assert "0.500 ± 0.100 (step 0)" in Page(html.page(report)).text
    (curve,) = [c for c in report.curves if c.name == "eval/score"]
    assert curve.points[:2] == [(0, 0.5), (2, 0.2)]


def said(response, **given):
    values = {"index": 0, "prompt": "a prompt", "response": response, "score": 1.0, "kl": 0.0,
              "length": 2, "ended": True}  # fmt: skip
    return Sample(**(values | given))


def test_replies_of_an_environment_are_set_apart(talk, tmp_path):
    session = SessionFolder(shutil.copytree(talk.folder, tmp_path / "talk"))
    with JournalReader(session) as record:
        one, other = record.samples.of_step(2)[:2]
    prefer(session, one.prompt, Response.of(one), Response.of(other), "ana")
    report = read_report(session, lambda: NOW)
    page = html.page(report)
    assert (
        '<pre> The plot is thin.</pre><pre class="reply">Why?</pre><pre> It has no end.</pre>'
        '<pre class="reply">And the actors?</pre><pre> I left early.</pre><p>rejected</p>'
    ) in page
    assert "· 11 tokens · 3 turns" in page
    Page(page)
    shown = markdown.page(report)
    assert "\n```text\n The plot is thin.\n```\n\n> ```text\n> Why?\n> ```\n\n```text\n" in shown
    for text in (page, shown):
        assert "What the environment replied is set apart" in text


def test_a_run_without_an_environment_names_none(report):
    page = html.page(report)
    assert "environment" not in page[page.index('id="samples"') : page.index('id="judgements"')]
    assert '<pre class="reply">' not in page
    assert "\n> " not in markdown.page(report)


def test_a_long_conversation_is_cut_and_says_so():
    text = "a" * 1190 + "b" * 100 + "c"
    assert cut_turns(text, [(1190, 1290)]) == [
        Turn("a" * 1190, False), Turn("b" * 10 + "… (91 more characters)", True),
    ]  # fmt: skip
    assert cut_turns(text, [(1210, 1290)]) == [
        Turn("a" * 1190 + "b" * 10 + "… (91 more characters)", False)
    ]


def test_another_run_is_put_beside_it(root, session_maker, tmp_path):
    other = session_maker(tmp_path / "s", "second", 40)
    report = read_report(SessionFolder(root / "frozen"), lambda: NOW, other)
    source, text = html.page(report), markdown.page(report)
    page = Page(source)
    assert "second is orange" in page.text
    # Nobody has judged the other run.
    assert source.count('class="other"') == len([c for c in report.curves if c.name != AGREEMENT])
    assert "| train.steps | 200 | 40 |" in text
    assert "| steps | 200 | 40 |" in text
    assert "train.steps20040" in page.text
    assert "(the other run)" in text


def test_a_session_without_a_step_has_a_report(tmp_path):
    session = create(tmp_path / "s", "new", config_of())
    report = read_report(session)
    assert "0 of" in Page(html.page(report)).text
    assert "state: " in markdown.page(report)


def test_a_session_of_an_earlier_version_that_was_killed_has_a_report(tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(OLD / "killed", folder, ignore=shutil.ignore_patterns("checkpoints", "tb"))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("@FOLDER@", str(tmp_path)))
    page = Page(html.page(read_report(SessionFolder(folder))))
    for words in ("crashed", "→ 0.2", "looks dull", "engine died"):
        assert words in page.text, words


def test_the_start_and_the_end_of_a_short_run_are_its_halves(tmp_path):
    shutil.copy(OLD / "finished" / "journal.db", tmp_path)
    with JournalReader(SessionFolder(tmp_path)) as reader:
        curve = reader.metrics.series(SCORE)
        score = read_headlines(reader, len(curve))[0]
    values = [value for _, value in curve]
    assert len(values) == 6
    assert (score.first, score.last) == pytest.approx((fmean(values[:3]), fmean(values[3:])))


# -- harmless --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A session in which every text that people or models write is hostile."""
    session = create(tmp_path_factory.mktemp("h") / "s", "hostile", config_of())
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    for step in (1, 2, 3):
        journal.record_step(
            StepReport(
                step=step, metrics={"objective/scores": float(step), f"reward/{HOSTILE}": 1.0},
                samples=[said(HOSTILE, index=i, prompt=HOSTILE) for i in range(3)], settings={},
            )
        )  # fmt: skip
    journal.record_event("alert", {"rule": HOSTILE, "text": HOSTILE}, 2)
    journal.record_event("note", {"text": HOSTILE, "who": HOSTILE}, 2)
    journal.commands.record("c", "set", {"key": HOSTILE, "value": HOSTILE}, HOSTILE)
    journal.commands.accept("c")
    journal.commands.apply("c", 2, [])
    journal.set_meta(state="failed", message=HOSTILE)
    journal.record_event("error", {"text": HOSTILE})
    journal.close()
    with JournalReader(session) as reader:
        rows = reader.samples.page(SampleQuery(), 3)
    set_label(session, HOSTILE, Response.of(rows[0]), "hack", HOSTILE)
    set_note(session, HOSTILE, Response.of(rows[0]), HOSTILE, HOSTILE)
    other = msgspec.structs.replace(Response.of(rows[1]), response="another")
    prefer(session, HOSTILE, other, Response.of(rows[0]), HOSTILE)
    return read_report(session)


OURS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "nav", "a",
    "main", "section", "dl", "dt", "dd", "div", "table", "tr", "th", "td", "figure", "figcaption",
    "svg", "path", "text", "polyline", "circle", "details", "summary", "pre",
    "g",
}  # fmt: skip


def test_hostile_text_stays_text_in_html(hostile):
    source = html.page(hostile)
    page = Page(source)
    assert {tag for tag, _ in page.tags} <= OURS
    assert "<script>alert(1)</script>" in page.text, "it is shown, as text"
    for tag, attributes in page.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "style")
        ]
        assert attributes.get("href", "#").startswith("#"), tag
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", source)


def test_the_page_forbids_scripts_and_requests_and_names_no_address(report):
    source = html.page(report)
    (policy,) = [a["content"] for t, a in Page(source).tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert set(re.findall(r"https?://[\w./]+", source)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in source
    assert "@import" not in source


def test_hostile_text_stays_text_in_markdown(hostile):
    source = markdown.page(hostile)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", source)
    outside, fence = [], ""
    for line in source.splitlines():
        run = re.match("`{3,}", line)
        if not fence and run:
            fence = run[0]
        elif fence and line == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert fence == "", "each block is closed"
    text = "\n".join(outside)
    tags = re.findall(r"<[^ >]*", text)
    assert set(tags) <= {"<details", "<summary", "</summary", "</details"}
    assert not re.search(r"(?<!\\)[\[\]`]", text)
    assert "http://" not in text
    assert "www.evil" not in text
    assert [line for line in outside if line.startswith("# ")] == ["# hostile"]
    tables = [line for line in outside if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables}) <= 9


# -- small -----------------------------------------------------------------------------------------


def test_a_run_of_100_000_steps_with_long_texts_is_a_small_page(tmp_path):
    steps, text = 100_000, "<&\"'" * 2000
    session = create(tmp_path / "s", "long", config_of(**{"train.steps": steps}))
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    names = ("objective/scores", "objective/kl")
    # The first step by the writer; the others as rows, which takes seconds instead of minutes.
    samples = [said(text, index=i, prompt=text) for i in range(30)]
    metrics = dict.fromkeys(names, 0.5)
    journal.record_step(StepReport(step=1, metrics=metrics, samples=samples, settings={}))
    for i in range(200):
        journal.record_event("alert", {"rule": text, "text": text}, 400 * i)
        journal.record_event("note", {"text": text, "who": text}, 400 * i)
    for i in range(160):
        journal.commands.record(f"c{i}", "set", {"key": "beta", "value": i}, text)
        journal.commands.accept(f"c{i}")
        journal.commands.apply(f"c{i}", 500 * i + 2, [])
    journal.close()
    with closing(sqlite3.connect(session.journal_file)) as db, db:
        db.execute(
            "WITH RECURSIVE n(s) AS (SELECT 2 UNION ALL SELECT s + 1 FROM n WHERE s < ?) "
            "INSERT INTO steps (step, attempt, time) SELECT s, 1, s FROM n",
            (steps,),
        )
        db.execute(
            "INSERT INTO metrics (name, step, value) SELECT names.id, steps.step, "
            "(steps.step * 7919 % 1000) / 1000.0 FROM names CROSS JOIN steps WHERE step > 1"
        )
    with JournalReader(session) as reader:
        rows = reader.samples.page(SampleQuery(), 30)
    for row in rows:
        set_label(session, row.prompt, Response.of(row), "good", text)
        set_note(session, row.prompt, Response.of(row), text, text)
    report = read_report(session)
    assert len(html.page(report).encode()) < MAX_BYTES
    assert len(markdown.page(report).encode()) < MAX_BYTES
    assert max(len(c.points) for c in report.curves) <= 2 * SPANS + 1
    assert "rows left out" in html.page(report)


# -- the pictures ----------------------------------------------------------------------------------


def test_a_picture_is_well_formed_and_within_its_frame(report):
    marks = [
        Mark(s, str(s), "<&\x1b>", k) for s in range(1, 200) for k in ("intervention", "alert")
    ]
    for curve in report.curves:
        picture = ET.fromstring(chart(curve, marks, 200))  # noqa: S314 - our own
        numbers = [t for t in picture.iter() if t.get("class") == "number"]
        assert 2 <= len(numbers) < 60, "labels that would overlap are left out"
        for line in picture.iter("{http://www.w3.org/2000/svg}polyline"):
            for spot in line.get("points").split():
                x, y = map(float, spot.split(","))
                assert 0 <= x <= 400
                assert 0 <= y <= 200


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [math.inf, 1.0], [-1e-9], [-1.7e308, 1.7e308], [-5e-324, 5e-324], [1e-320]],
)
@pytest.mark.parametrize("times", [1, 50])
def test_a_curve_of_any_values_has_a_picture_and_a_line_of_blocks(values, times):
    curve = Curve("objective/kl", list(enumerate(values * times, 1)))
    picture = chart(curve, [], 1)
    ET.fromstring(picture)  # noqa: S314 - our own
    assert not re.search(r"\b(nan|inf)\b", picture)
    assert spark([value for _, value in curve.points])


def test_values_that_differ_by_rounding_are_a_flat_line():
    rate = [(step, 1e-4 * (1 + step % 3 * 4e-16)) for step in range(1, 60)]
    assert set(spark([value for _, value in rate])) == {"▁"}
    (line,) = ET.fromstring(chart(Curve("lr", rate), [], 60)).iter(  # noqa: S314 - our own
        "{http://www.w3.org/2000/svg}polyline"
    )
    assert len({spot.split(",")[1] for spot in line.get("points").split()}) == 1


def test_a_moving_mean_is_exact_after_a_spike():
    spiked = [(step, 1e18 if step == 3 else 1.0) for step in range(100)]
    assert moving_mean(spiked)[20:] == spiked[20:]


def test_ticks_are_round_and_distinct():
    assert [tick_label(t, 0.5) for t in ticks(-0.4, 1.6)] == ["0.0", "0.5", "1.0", "1.5"]
    assert [tick_label(t, 2.5) for t in ticks(0, 11)] == ["0.0", "2.5", "5.0", "7.5", "10.0"]
    assert tick_label(0.00032, 0.00002) == "3.2e-4"
    assert [tick_label(t, 5e-6) for t in (1e-4, 1.05e-4)] == ["1.00e-4", "1.05e-4"]
    assert tick_label(20000, 10000) == "20,000"


def test_a_moving_mean_does_not_lag():
    line = [(step, float(step)) for step in range(100)]
    assert moving_mean(line) == pytest.approx(line)


def test_steps_are_spread_with_both_ends():
    assert spread([1, 2], 5) == [1, 2]
    assert spread(list(range(1, 101)), 5) == [1, 26, 51, 75, 100]


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "start"), [("r.html", "<!DOCTYPE html>"), ("r.md", "# frozen")])
def test_the_name_of_the_file_says_which_form(root, tmp_path, file, start):
    target = tmp_path / file
    target.write_text("an older one")
    done = CliRunner().invoke(cli, ["report", "frozen", "--sessions", str(root), "-o", str(target)])
    assert done.exit_code == 0, done.output
    assert target.read_text().startswith(start)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_another_form_is_refused(root, tmp_path):
    done = CliRunner().invoke(
        cli, ["report", "frozen", "--sessions", str(root), "-o", str(tmp_path / "r.pdf")]
    )
    assert "name the file .html or .md" in str(done.exception)
    assert not (tmp_path / "r.pdf").exists()


def test_a_place_that_cannot_be_written_is_named(root, tmp_path):
    target = tmp_path / "none" / "r.md"
    done = CliRunner().invoke(cli, ["report", "frozen", "--sessions", str(root), "-o", str(target)])
    assert str(done.exception).startswith(f"cannot write {target}: No such file or directory")
