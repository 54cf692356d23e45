"""Kills engine, rank and supervisor at every stage of sending weights and of generating.

``python -m tests.faults.rollout_kills --out FOLDER`` needs vLLM (make vllm) and about a minute a
kill. One run meets all kills, each at a named point of a rank (tests/faults/hooks), is resumed when
its supervisor was killed, and must end as a run that met none: the same metrics, to the bit, and
the same weights. Nothing may hang, and no process may be left.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

from engine.session.checkpoints import checkpoint_path
from engine.verification.verify import verify
from tests.e2e.lab import Lab, Run, processes
from tests.faults.lab import HOOKS
from tests.waiting import until

STEPS = 15
WAIT = 900.0
"""Seconds for anything on a busy machine; more counts as hung."""
OPTIONS = (
    "rollout.engine=vllm", "rollout.ahead=1", "ppo.rollout_correction=truncate",
    "rollout.batch_size=8", "rollout.max_new_tokens=24", "train.save_every=3",
    "train.keep_last=100", "launch.max_restarts=1000",
)  # fmt: skip
VICTIMS = {"engine": "kill rollout engine", "rank": "kill", "supervisor": "kill supervisor"}
VLLM = "engine.train.rollout.vllm"
STAGES = [
    ("the engine builds its model", f"{VLLM}.client:RolloutClient.wait_ready", "before", 1),
    ("weights are written", f"{VLLM}.weights:send_weights", "after", 1),
    # _send: Start, LoadWeights, Generate, and NextTurns for every eighth token, at first for none.
    ("weights are loaded", f"{VLLM}.client:RolloutClient._send", "after", 2),
    ("responses are generated", f"{VLLM}.client:RolloutClient._send", "after", 5),
    ("responses are passed on", f"{VLLM}.backend:VllmBackend.distribute", "before", 1),
    ("generation ahead has begun", "engine.train.rollout.ahead:RolloutAhead.begin", "after", 1),
    # Late enough that a checkpoint is there to resume from, where a process comes so far.
    ("the policy is updated beside it", "engine.train.ppo.optimise:optimise", "before", 4),
    ("responses ahead are taken", "engine.train.rollout.ahead:RolloutAhead.take", "before", 4),
]
"""What happens, and the call by which a rank notices it: MODULE:NAME, when, and which call."""


def points(folder: Path, first: int) -> dict[str, str]:
    """The marker of each kill → its description in $RLHF_TUI_TEST_POINT."""
    found = {}
    for number, (_, place, when, count) in enumerate(STAGES[first:], first):
        for victim, act in VICTIMS.items():
            marker = folder / f"{number}-{victim}"
            found[str(marker)] = f"{place}|{when}|{count}|{act}|{marker}"
    return found


class KilledRun:
    """The run that meets all kills."""

    def __init__(self, root: Path, options: tuple[str, ...], first: int) -> None:
        self.markers = root / "markers"
        self.markers.mkdir()
        self._points = points(self.markers, first)
        self.lab = Lab(root / "sessions", root / "gates")
        self.lab.environment |= {
            "PYTHONPATH": str(HOOKS),
            "RLHF_TUI_TEST_POINT": ";".join(self._points.values()),
        }
        self.run: Run = self.lab.run("killed", *options, steps=STEPS)
        self.resumes = 0

    def met(self) -> list[str]:
        """The kills that have happened."""
        return sorted(Path(m).name for m in self._points if Path(m).exists())

    def missing(self) -> list[str]:
        """Those that have not."""
        return sorted(Path(m).name for m in self._points if not Path(m).exists())

    def train(self) -> None:
        """Runs to the end, through all kills."""
        # They fail if they meet a kill while they wait for the models.
        self.lab.cli(*self.run.arguments, "--detach", timeout=WAIT)
        while True:
            before = len(self.met())
            until(
                lambda before=before: len(self.met()) > before
                or not processes(self.run.session.folder),
                f"another kill after {self.met()}", WAIT,
            )  # fmt: skip
            print(time.strftime("%X"), f"{len(self.met())} kills, step {self.run.step}", flush=True)
            if not self.run.session.is_live():
                until(lambda: not processes(self.run.session.folder), "end of all processes", WAIT)
                if self.run.state == "finished":
                    return
                if self.run.state == "failed":
                    raise AssertionError(self.run.session.log_file.read_text()[-3000:])
                self.resumes += 1
                if self.resumes > 2 * len(self._points):
                    raise AssertionError(f"no end after {self.resumes} resumes")
                self.lab.cli("resume", self.run.name, "--detach", timeout=WAIT)


def weights(run: Run) -> str:
    """The sum of the policy's file after the last step."""
    file = checkpoint_path(run.session.checkpoints, STEPS) / "policy" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def lags(run: Run) -> list[float]:
    """How old the weights were that sampled the responses of each step."""
    with run.reader() as reader:
        return [row.values["rollout/version_lag"] for row in reader.metrics.rows()]


def problems(killed: Run, undisturbed: Run) -> list[str]:
    """What is not as it must be after all kills."""
    found = [f.text for f in verify(killed.session).findings if f.level == "problem"]
    if killed.numbers() != undisturbed.numbers():
        found.append("the metrics differ from those of the undisturbed run")
    if weights(killed) != weights(undisturbed):
        found.append("the weights differ from those of the undisturbed run")
    if lags(killed) != lags(undisturbed) or not set(lags(killed)) <= {0, 1}:
        found.append(f"responses of other weights: {lags(killed)} and {lags(undisturbed)}")
    if left := processes(killed.session.folder):
        found.append(f"processes are left: {left}")
    return found


def main() -> int:
    """Runs both runs and compares them; returns 1 if something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--first", type=int, default=0, help="leave out the stages before")
    parser.add_argument("-o", dest="options", action="append", default=[], help="KEY=VALUE")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    keys = (*OPTIONS, *options.options)
    quiet = Lab(options.out / "undisturbed", options.out / "quiet-gates")
    undisturbed = quiet.run("undisturbed", *keys, steps=STEPS)
    undisturbed.start()
    undisturbed.finish()
    killed = KilledRun(options.out, keys, options.first)
    began = time.monotonic()
    try:
        killed.train()
    finally:
        killed.run.end()
    found = problems(killed.run, undisturbed)
    result = {
        "kills": len(killed.met()), "of": len(killed.met()) + len(killed.missing()),
        "not reached": killed.missing(), "resumes": killed.resumes,
        "notices of another engine": sum("another one is started" in str(e)
                                         for e in killed.run.events("alert")),
        "lags": lags(killed.run), "minutes": round((time.monotonic() - began) / 60, 1),
        "problems": found,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    return 1 if found or killed.missing() else 0


if __name__ == "__main__":
    sys.exit(main())
