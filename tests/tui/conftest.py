"""A frozen session of 200 steps, made by the journal itself, and the app on it."""

import contextlib
import math
import os
import random
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import starter
from engine.config import file as config_file
from engine.config.settings import SettingChange, settings_of
from engine.journal.judgements.labels import Response, prefer, set_label, set_note
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.journal.writer import JournalWriter
from engine.protocol.client_messages import CommandReply
from engine.protocol.rank_messages import Sample, StepReport, TokenArrays
from engine.session.engine_info import EngineInfo
from engine.session.folder import SessionFolder, create
from rlhf_tui.app import steering
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.state import command_sender
from rlhf_tui.widgets.samples.sample_view import SampleView
from rlhf_tui.widgets.table import Table
from tests.judging import STEPS

START = 1_700_000_000.0
STEP_SECONDS = 4.0
NOW = START + 3600
WORDS = (
    *("a", "the", "film", "was", "good", "really", "loved", "it", "story", "actors", "never"),
    *("dull", "and", "moving", "scene", "warm"),
)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Preferences of the test alone, in one time zone, with all colours; the program on PATH."""
    program = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", f"{program}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("RLHF_TUI_SESSIONS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


# Everything that a screen shows: the demo's own values may change.
SETTINGS = {
    "kl.controller": "adaptive", "kl.beta": 0.05, "kl.target": 6.0, "kl.horizon": 500.0,
    "kl.beta_min": 1e-4, "kl.beta_max": 10.0, "train.learning_rate": 3e-4, "train.save_every": 25,
    "ppo.clip_range": 0.2, "ppo.epochs": 2, "ppo.stop_kl": "null", "rollout.batch_size": 64,
    "rollout.temperature": 1.0, "rollout.max_new_tokens": 32,
}  # fmt: skip


def config_of(**values):
    overrides = [f"{key}={value}" for key, value in (SETTINGS | values).items()]
    return config_file.load(starter.FOLDER / "demo.yaml", overrides)


def metrics_of(step: int, rng: random.Random, beta: float) -> dict[str, float]:
    rise = 1 - math.exp(-step / 60)
    kl = 9 * rise + rng.gauss(0, 0.4)
    return {
        "objective/scores": -0.4 + 1.9 * rise + rng.gauss(0, 0.08),
        "objective/scores_std": 0.9 + rng.gauss(0, 0.05),
        "objective/kl": max(kl, 0.0),
        "objective/kl_per_token": max(kl, 0.0) / 28,
        "objective/kl_coef": beta,
        "policy/clipfrac_avg": 0.08 + 0.03 * math.sin(step / 15) + rng.random() * 0.02,
        "policy/entropy_avg": 3.2 - 1.1 * rise + rng.gauss(0, 0.03),
        "tokens/response_len_mean": 25 + 4 * rise + rng.gauss(0, 0.5),
        "tokens/truncated_frac": 0.2 + rng.random() * 0.1,
        "lr": 3e-4,
        "grad_norm": 1 + rng.random() * 0.4,
        "time/generate": 2.1 + rng.random() * 0.1,
        "time/score": 0.3,
        "time/reference": 0.4,
        "time/optimise": 1.2,
        "time/step": 4.0 + rng.random() * 0.2,
        "perf/tokens_per_second": 430 + rng.random() * 20,
        "perf/peak_memory_gb": 1.24,
    }


def sample_of(index: int, rng: random.Random, arrays: bool, **given) -> Sample:
    length = rng.randint(8, 24)
    words = [" " + rng.choice(WORDS) for _ in range(length)]
    values = [rng.gauss(0, 1) for _ in range(length)]
    kept = TokenArrays(
        tokens=words, token_ids=list(range(length)), logprob=[-abs(v) for v in values],
        ref_logprob=[-abs(v) - 0.3 * i / length for i, v in enumerate(values)],
        advantage=values, value=[v / 2 for v in values],
    )  # fmt: skip
    whole = {
        "index": index, "prompt": "I watched this one with", "response": "".join(words),
        "score": rng.gauss(1, 0.8), "kl": abs(rng.gauss(7, 2)), "length": length,
        "ended": index % 5 != 0, "parts": {"reward": 1.0}, "arrays": kept if arrays else None,
    }  # fmt: skip
    return Sample(**(whole | given))


def write_steps(journal: JournalWriter, settings: dict, first: int, last: int, rng: random.Random):
    for step in range(first, last + 1):
        samples = [sample_of(i, rng, i < 4) for i in range(8)]
        journal.record_step(
            StepReport(
                step=step, metrics=metrics_of(step, rng, settings["beta"]), samples=samples,
                settings=settings,
            )
        )  # fmt: skip
        if step % 50 == 0:
            journal.checkpoints.record(step, 49_000_000, 1.2, 7.5)
            journal.checkpoints.complete(step)
        if step == 62:
            change(journal, settings, "beta", 0.08, 63, "ana on pts/1")
        if step == 120:
            change(journal, settings, "target", 8.0, 121, "ben on pts/2 from 10.0.0.7")
        if step == 140:
            text = "KL 8.9 nats is above 1.5 times the target"
            journal.record_event("alert", {"rule": "kl-runaway", "text": text}, step)
        if step == 150:
            note = {"text": "answers begin to repeat themselves", "who": "ana on pts/1"}
            journal.record_event("note", note, step)


def change(journal: JournalWriter, settings: dict, key: str, new: object, step: int, who: str):
    command = "beta" if key == "beta" else "set"
    args = {"value": new} if key == "beta" else {"key": key, "value": new}
    journal.commands.record(f"c{step}", command, args, who)
    journal.commands.accept(f"c{step}")
    journal.commands.apply(f"c{step}", step, [SettingChange(key=key, old=settings[key], new=new)])
    settings[key] = new


def make_session(root: Path, name: str = "frozen", steps: int = 200) -> SessionFolder:
    """A session that was resumed once from step 100, and is finished."""
    session = create(root, name, config_of(**{"train.steps": steps}))
    rng = random.Random(7)  # noqa: S311 - no secret
    settings = _dict(session)
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    journal.set_meta(total_steps=steps, state="running", message="", settings=settings)
    if steps > 120:
        write_steps(journal, settings, 1, 117, rng)
        journal = JournalWriter(session)  # of another engine: the first one was killed
        journal.begin_attempt(100, fresh=False)
        write_steps(journal, settings, 101, steps, rng)
    else:
        write_steps(journal, settings, 1, steps, rng)
    journal.commands.record("p1", "beta", {"value": 3.5}, "ben on pts/2")
    journal.commands.reject("p1", "beta must be at most 1.0")
    journal.set_meta(state="finished")
    journal.record_event("state", {"state": "finished", "text": ""})
    journal.close()
    session.log_file.write_text(
        "".join(f"12:00:{i % 60:02d} step {i} done\n" for i in range(1, 301))
        + "WARNING slow disk\nERROR something failed\nweights: 10%\rweights: 100%\n"
    )
    freeze(session)
    return session


def _dict(session: SessionFolder) -> dict:
    settings = settings_of(session.config())
    return {name: getattr(settings, name) for name in settings.__struct_fields__}


def freeze(session: SessionFolder) -> None:
    """Times that do not depend on when the test runs."""
    db = sqlite3.connect(session.journal_file)
    with db:
        for table in ("steps", "steps_past"):
            db.execute(f"UPDATE {table} SET time = ? + step * ?", (START, STEP_SECONDS))  # noqa: S608 - two names
        db.execute("UPDATE events SET time = ? + step * ?", (START, STEP_SECONDS))
        db.execute("UPDATE checkpoints SET time = ? + step * ?", (START, STEP_SECONDS))
        db.execute(
            "UPDATE commands SET queued = :s + coalesce(applied_step, 200) * 4, "
            "ended = :s + coalesce(applied_step, 200) * 4",
            {"s": START},
        )
        last = "(SELECT max(attempt) FROM attempts)"
        db.execute(
            f"UPDATE attempts SET started = ?, pid = 4242 + {last} - attempt, host = 'box', "  # noqa: S608 - a constant
            "ended = CASE WHEN ended IS NOT NULL THEN ? END",
            (START, START + 900),
        )
    db.close()


def judge(session: SessionFolder) -> None:
    """What two people think of some answers to the last step's prompt."""
    with JournalReader(session) as reader:
        rows = {r.index: r for r in reader.samples.page(SampleQuery(), 8)}
    prompt, of = rows[0].prompt, {i: Response.of(row) for i, row in rows.items()}
    for index, label in ((1, "good"), (2, "bad"), (3, "hack")):
        set_label(session, prompt, of[index], label, "ana on pts/1")
    set_note(session, prompt, of[3], "says 'film' wherever it can", "ana on pts/1")
    set_note(session, prompt, of[5], "ask for more of these", "ben on pts/2 from 10.0.0.7")
    prefer(session, prompt, of[1], of[0], "ana on pts/1")
    with contextlib.closing(sqlite3.connect(session.labels_file)) as db, db:
        db.execute("UPDATE judgements SET time = ?", (START + 900,))
        db.execute("UPDATE preferences SET time = ?", (START + 900,))


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Iterator[Path]:
    """One folder for all tests that only read; fails if one of them has judged a response."""
    root = tmp_path_factory.mktemp("frozen") / "sessions"
    session = make_session(root)
    judge(session)
    judgements = session.labels_file.read_bytes()
    yield root
    assert session.labels_file.read_bytes() == judgements, "a test has changed what all share"


def conversation(index: int, turns: list[str], replies: list[str]) -> Sample:
    """A sample whose turns have replies between them, each word being a token."""
    response, spans = turns[0], []
    for reply, turn in zip(replies, turns[1:], strict=True):
        spans.append((len(response), len(response + reply)))
        response += reply + turn
    words = [[f" {word}" for word in turn.split()] for turn in turns]
    tokens = [word for turn in words for word in turn]
    values = [0.25 * (i % 5) for i in range(len(tokens))]
    arrays = TokenArrays(
        tokens=tokens, token_ids=list(range(len(tokens))), logprob=[-v for v in values],
        ref_logprob=[-2 * v for v in values], advantage=values, value=values,
        before_replies=[sum(map(len, words[:i])) for i in range(1, len(words))],
    )  # fmt: skip
    return Sample(
        index=index, prompt="I watched this one with", response=response, replies=spans,
        score=0.5 * index, kl=1.0, length=len(tokens), ended=True, arrays=arrays,
    )  # fmt: skip


@pytest.fixture(scope="session")
def talk(tmp_path_factory) -> SessionFolder:
    """A session with an environment: two steps of responses of three turns, two and one."""
    session = create(tmp_path_factory.mktemp("talk") / "sessions", "talk", config_of())
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    settings = _dict(session)
    journal.set_meta(total_steps=2, state="running", message="", settings=settings)
    replies = ["\nWhy?\n", " And the actors?"]
    for step, first in ((1, " The plot is slow."), (2, " The plot is thin.")):
        samples = [
            conversation(0, [first, " It has no end.", " I left early."], replies),
            conversation(1, [" a friend.", " It was warm."], replies[:1]),
            conversation(2, [" some doubts."], []),
        ]
        metrics = metrics_of(step, random.Random(step), 0.05)  # noqa: S311 - no secret
        journal.record_step(
            StepReport(
                step=step, metrics=metrics, samples=samples, settings=settings, evaluated=samples
            )
        )
    journal.set_meta(state="finished")
    journal.record_event("state", {"state": "finished", "text": ""})
    journal.close()
    session.log_file.write_text("")
    freeze(session)
    return session


@pytest.fixture
def make_app(root, monkeypatch):
    """The app on the frozen session, its clock stopped, in the shell's folder of sessions."""

    def make(name: str | None = "frozen", **options) -> RlhfApp:
        folder = options.pop("root", root)
        monkeypatch.setenv("RLHF_TUI_SESSIONS", str(folder))
        return RlhfApp(folder, name, now=lambda: NOW, follow=False, **options)

    return make


@pytest.fixture(scope="session")
def session_maker(tmp_path_factory):
    """Makes further sessions, as :func:`make_session` does: copies of one that is written once."""
    originals = tmp_path_factory.mktemp("originals")

    def make(root: Path, name: str = "frozen", steps: int = 200) -> SessionFolder:
        original = originals / str(steps) / name
        if not original.exists():
            make_session(original.parent, name, steps)
        # New times of the files: they say which session was written last.
        shutil.copytree(original, root / name, copy_function=shutil.copy)
        return SessionFolder(root / name)

    return make


DEADLINE = 60.0


async def wait_until(pilot, condition, what="", deadline=DEADLINE):
    """Waits for a condition, with a deadline."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what or condition}"
        await pilot.pause(0.02)


@pytest.fixture
def until():
    return wait_until


@pytest.fixture
def running():
    """Runs an app until it knows its session."""

    @contextlib.asynccontextmanager
    async def run(app, size=(120, 40)):
        async with app.run_test(size=size, notifications=True) as pilot:
            await wait_until(
                pilot, lambda: app.state.known or app.current_mode == "sessions", "the state"
            )
            await pilot.pause()
            yield pilot

    return run


@pytest.fixture
def run_app(make_app, running):
    """Runs the app on a session; yields it with its pilot."""

    @contextlib.asynccontextmanager
    async def run(name="frozen", size=(120, 40), **options):
        app = make_app(name, **options)
        async with running(app, size) as pilot:
            yield app, pilot

    return run


@pytest.fixture
def engine(monkeypatch):
    """An engine that accepts and applies everything, and writes down what it was asked."""
    sent = []

    class Fake:
        def __init__(self, session, who):
            self.session = session

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return None

        def send(self, command, command_id):
            sent.append(command)
            return CommandReply(id=command_id, status="accepted")

        def wait(self, command_id, timeout):
            result = {}
            if isinstance(sent[-1], steering.Probe):
                result = {
                    n: {"response": f"{n} says", "score": 1.0, "kl": 2.0, "length": 2}
                    for n in ("policy", "reference")
                }
            # The controller has moved beta since the app read it.
            changes = [
                SettingChange(key="beta", old=0.075, new=c.value)
                for c in sent[-1:]
                if isinstance(c, steering.SetBeta)
            ]
            return CommandReply(
                id=command_id, status="applied", step=201, changes=changes, result=result
            )

    info = EngineInfo(pid=4242, host="box", socket="nowhere", version="1")
    monkeypatch.setattr(command_sender, "Client", Fake)
    monkeypatch.setattr(SessionFolder, "is_live", lambda self: True)
    monkeypatch.setattr(SessionFolder, "engine", lambda self: info)
    return sent


@pytest.fixture
def judged(session_maker, tmp_path):
    """A session of a test's own, all of whose answers are to one prompt, to be judged."""
    return session_maker(tmp_path / "sessions", "judged", STEPS)


@pytest.fixture
def samples(judged, running, until):
    """Opens the app on its answers."""

    @contextlib.asynccontextmanager
    async def open_samples(size=(120, 40), **options):
        options = {"follow": False} | options
        app = RlhfApp(judged.folder.parent, "judged", now=lambda: 1_700_003_600.0, **options)
        async with running(app, size) as pilot:
            await pilot.press("3")
            table = app.screen.query_one(Table)
            await until(pilot, lambda: table.count() == 8 * STEPS)
            await until(pilot, lambda: app.screen.query_one(SampleView).sample is not None)
            yield app, pilot

    return open_samples
