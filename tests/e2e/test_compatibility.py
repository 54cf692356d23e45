"""Sessions written by version 0.1.0 can be read, resumed and forked.

`tests/data/sessions-0.1.0` holds two sessions with their models and prompts. `finished` ran six
steps; one response has a label and a note. `killed` was paused after a checkpoint, got new values
of beta and the learning rate by commands, and was killed some steps later. `@FOLDER@` is a
placeholder for the folder in which they were written.
"""

import hashlib

import pytest

from tests.e2e.lab import OLD_SESSIONS

SAVED = max(
    int(folder.name.removeprefix("step-"))
    for folder in (OLD_SESSIONS / "sessions" / "killed" / "checkpoints").iterdir()
)
"""The last checkpoint of `killed`; its commands were applied at the next step."""
READ_COMMANDS = ("status", "metrics", "samples", "events")


def contents(folder):
    """The hash of every file below a folder, by path.

    Leaves out the `-shm` and `-wal` files that SQLite creates for readers; `-wal` must be empty.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert not [path for path in files if path.name.endswith("-wal") and path.stat().st_size]
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.endswith(("-shm", "-wal"))
    }


def series(lab, name, metric):
    return {row["step"]: row[metric] for row in lab.json("metrics", name)}


def test_they_are_listed_and_listing_changes_no_byte(old):
    before = contents(old.root / "finished")
    rows = {row["name"]: row for row in old.json("ls")}
    assert {name: row["state"] for name, row in rows.items()} == {
        "finished": "finished", "killed": "crashed",
    }  # fmt: skip
    assert contents(old.root / "finished") == before


def test_a_finished_one_is_read_and_reading_changes_no_byte(old):
    before = contents(old.root / "finished")
    status, metrics, samples, events = (old.json(verb, "finished") for verb in READ_COMMANDS)
    assert (status["state"], status["step"], status["total_steps"]) == ("finished", 6, 6)
    assert status["checkpoints"] == [3, 6]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(isinstance(row["objective/kl"], float) for row in metrics)
    assert {row["step"] for row in samples} == {1, 2, 3, 4, 5, 6}
    assert [row for row in samples if row["label"]]
    assert [row for row in samples if row["note"]]
    assert [e["step"] for e in events if e["kind"] == "checkpoint"] == [3, 6]
    assert contents(old.root / "finished") == before


def test_a_killed_one_is_read(old):
    status, metrics, samples, events = (old.json(verb, "killed") for verb in READ_COMMANDS)
    assert (status["state"], status["pid"], status["checkpoints"]) == ("crashed", None, [SAVED])
    assert status["step"] > SAVED
    assert [row["step"] for row in metrics] == list(range(1, status["step"] + 1))
    assert {row["step"] for row in samples} == {row["step"] for row in metrics}
    assert [e["text"] for e in events if e["kind"] == "note"] == ["looks dull"]
    changed = [
        (e["command"], e["new"], e["applied_step"])
        for e in events
        if e["kind"] == "command" and e["changes"]
    ]
    assert changed == [("beta", 0.2, SAVED + 1), ("set", 5e-4, SAVED + 1)]


@pytest.mark.slow
def test_a_finished_one_is_extended(old):
    before = old.json("metrics", "finished")
    done = old.cli("resume", "finished", "-o", "train.steps=8", "--headless")
    assert done.returncode == 0, done.stderr
    status = old.json("status", "finished")
    assert (status["state"], status["step"], status["attempt"]) == ("finished", 8, 2)
    after = old.json("metrics", "finished")
    # Metrics that this version added have no value in the old steps.
    assert [{name: row[name] for name in before[0]} for row in after[:6]] == before
    assert [row["step"] for row in after] == list(range(1, 9))


def test_a_killed_one_resumes_from_its_checkpoint_with_the_settings_of_its_commands(old):
    beta = series(old, "killed", "objective/kl_coef")
    last = SAVED + 7
    done = old.cli("resume", "killed", "-o", f"train.steps={last}", "--headless")
    assert done.returncode == 0, done.stderr
    status = old.json("status", "killed")
    assert (status["state"], status["step"]) == ("finished", last)
    rate = series(old, "killed", "lr")
    assert rate[SAVED] == 1e-3
    assert {rate[step] for step in range(SAVED + 1, last + 1)} == {5e-4}
    again = series(old, "killed", "objective/kl_coef")
    assert again[SAVED + 1] == 0.2
    assert {s: again[s] for s in range(1, SAVED + 2)} == {s: beta[s] for s in range(1, SAVED + 2)}
    assert abs(again[SAVED + 2] / 0.2 - 1) < 0.01, "the controller continues from there"
    assert again[SAVED + 2] != 0.2


@pytest.mark.slow
def test_a_finished_one_is_forked(old):
    done = old.cli("fork", "finished", "--from", "3", "--name", "branch", "--headless")
    assert done.returncode == 0, done.stderr
    status = old.json("status", "branch")
    assert (status["state"], status["step"]) == ("finished", 6)
    skip = ("time", "perf/", "attempt")
    ours, theirs = (  # metrics that the old version did not have are null in the copied steps
        [{k: v for k, v in row.items() if v is not None and not k.startswith(skip)} for row in rows]
        for rows in (old.json("metrics", "branch")[:3], old.json("metrics", "finished")[:3])
    )
    assert ours == theirs
