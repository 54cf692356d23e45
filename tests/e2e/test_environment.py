"""A run whose policy talks to an environment of the user's."""

from tests.e2e.lab import TINY

ENDLESS = """
import threading, time

class Talker:
    def reply(self, text):
        threading.Thread(target=time.sleep, args=(3600,)).start()  # and no daemon
        return " More?" if len(text) < 3 else None

    def words(self):
        return 1.0
"""


def test_a_thread_of_an_environment_does_not_keep_the_run_from_ending(lab, tmp_path):
    (tmp_path / "talker.py").write_text(ENDLESS)
    keys = (
        *TINY, "environment.factory=talker:Talker", f"environment.path={tmp_path}",
        "environment.max_tokens=24", "reward={model: null, environment: words}",
        'rollout.stop=[" a", "the"]',
    )  # fmt: skip
    options = [word for key in keys for word in ("-o", key)]
    done = lab.cli("demo", "--headless", "--name", "talks", "--steps", 2, *options)
    assert done.returncode == 0, done.stderr
    assert lab.json("status", "talks")["state"] == "finished"
    rows = lab.json("metrics", "talks")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["environment/turns"] >= 1 for row in rows)
    assert "the run has ended; not waiting for Thread-" in lab.cli("logs", "talks").stdout
