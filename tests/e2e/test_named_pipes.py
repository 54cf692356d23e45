"""A named pipe in place of a session's file, as whoever shares or gives the session can make it.

Opening one waits for its other end, so a command must refuse it.
"""

import os
import shutil

import pytest

from engine.session.folder import SessionFolder

FILES = (
    "engine.lock", "engine.json", "engine.log", "config.yaml", "journal.db", "journal.db-journal",
    "samples.db", "labels.db", "labels.db-journal", "checkpoints/step-000008/state.json",
    "checkpoints/step-000008/COMPLETE",
)  # fmt: skip
COMMANDS = (
    "ls", "status NAME", "logs NAME", "samples NAME", "verify NAME", "note NAME hi",
    "resume NAME -o train.steps=8 --detach", "rm NAME --checkpoint 8 -y", "rm NAME -y",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(make_lab):
    """A finished run, alone in its folder."""
    run = make_lab("named-pipes").with_light_ranks().run("finished")
    run.start("--headless")
    return run


@pytest.mark.parametrize("file", FILES)
def test_no_command_waits_for_its_other_end(finished, file):
    session = SessionFolder(finished.lab.root / "given")
    for command in COMMANDS:
        shutil.copytree(finished.session.folder, session.folder)
        (session.folder / file).unlink(missing_ok=True)
        os.mkfifo(session.folder / file)
        done = finished.lab.cli(*command.replace("NAME", session.name).split(), timeout=60)
        assert "Traceback" not in done.stdout + done.stderr
        shutil.rmtree(session.folder, ignore_errors=True)
