"""Recreates the runs and the pictures of docs/operating.md.

``python -m scripts.pictures.operating SESSIONS [NAME]...`` carries out the commands of the page
with the sessions in the folder SESSIONS, one after another, and writes what the dashboard shows of
each to docs/screens/operating-NAME.svg, and what its guard rails saw to
tests/data/operating/NAME.json, by which a test holds the alerts of the page. A session that is
there already is not run again. A run takes two to five minutes on a core.
"""

import argparse
import json
import os
import re
import shlex
import tempfile
from pathlib import Path

import msgspec

from engine import metrics
from engine.config.settings import settings_of
from engine.journal.reader import JournalReader
from engine.monitoring.divergence import judges_of
from engine.monitoring.guardrails import DEFAULT_RULES
from engine.session.folder import SessionFolder
from rlhf_tui.state.preferences import Preferences, preferences_file, save
from scripts.pictures.run import program, run
from scripts.pictures.svg import picture
from scripts.pictures.terminal import Terminal

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operating.md"
SCREENS = ROOT / "docs" / "screens"
RECORDED = ROOT / "tests" / "data" / "operating"
SIZE = (120, 34)
COMMAND = re.compile(r"^rlhf-tui (run examples/.*--name (\S+).*)$", re.MULTILINE)
CHARTS = [
    metrics.SCORE, metrics.KL, metrics.ENTROPY, metrics.RESPONSE_LENGTH, metrics.CLIP_FRACTION,
    metrics.DISTINCT_2,
]  # fmt: skip
OTHER_CHARTS = {"hacking": {metrics.CLIP_FRACTION: "reward/judge"}}
"""Run → metric → the metric that is charted instead."""


def commands() -> dict[str, list[str]]:
    """The arguments of each run of the page, by its name."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    return {name: shlex.split(line) for line, name in COMMAND.findall(text)}


def take_picture(sessions: Path, name: str) -> Path:
    """Writes what the dashboard shows of a session; returns the file."""
    others = OTHER_CHARTS.get(name, {})
    save(preferences_file(), Preferences(charts=[others.get(c, c) for c in CHARTS], columns=2))
    command = program("attach", name, "--sessions", str(sessions), "--read-only")
    with Terminal(command, SIZE, "truecolor") as app:
        app.wait_for("step")
        screen = app.settled()
    path = SCREENS / f"operating-{name}.svg"
    path.write_text(picture(screen), encoding="utf-8")
    return path


def record(sessions: Path, name: str) -> Path:
    """Writes the metrics that the default guard rails look at, to six digits; returns the file.

    The value of a step at which a metric is undefined is null.
    """
    session = SessionFolder(sessions / name)
    config = session.config()
    judges = judges_of(config)
    with JournalReader(session) as reader:
        names = sorted({rule.metric for rule in DEFAULT_RULES} | judges)
        series = {name: dict(reader.metrics.series(name)) for name in names}
    steps = range(1, config.train.steps + 1)
    recorded = {
        "settings": msgspec.structs.asdict(settings_of(config)),
        "judges": sorted(judges),
        "metrics": {
            name: [_rounded(values.get(step)) for step in steps]
            for name, values in series.items()
            if values
        },
    }
    path = RECORDED / f"{name}.json"
    path.write_text(json.dumps(recorded) + "\n", encoding="utf-8")
    return path


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def main() -> None:
    """Makes the named runs, by default all, and prints what the guard rails said."""
    parser = argparse.ArgumentParser(prog="python -m scripts.pictures.operating")
    parser.add_argument("sessions", type=Path, help="folder of the runs; those in it are kept")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of the page")
    given = parser.parse_args()
    if unknown := set(given.names) - set(commands()):
        parser.error(f"the page has no {', '.join(unknown)}, only {', '.join(commands())}")
    root = given.sessions.resolve()
    with tempfile.TemporaryDirectory() as folder:
        # Not the operator's preferences.
        os.environ |= {"XDG_CONFIG_HOME": folder, "XDG_STATE_HOME": folder}
        for name, words in commands().items():
            if given.names and name not in given.names:
                continue
            if not (root / name).exists():
                os.chdir(ROOT)  # where the paths of the page begin
                run(*words, "--sessions", str(root), "--headless")
            print(take_picture(root, name))
            print(record(root, name))
            print(run("guardrails", name, "--sessions", str(root)))


if __name__ == "__main__":
    main()
