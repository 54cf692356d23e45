"""A run's state, made without a journal, and what a panel shows of it."""

import msgspec

from engine.journal.rows import AttemptRow, CommandRow
from rlhf_tui.state.feeds.updates import SessionSummary, SessionUpdate
from rlhf_tui.state.session_state import SessionState

FIRST = AttemptRow(
    attempt=1, from_step=0, fresh=False, started=1.0, ended=None, pid=77, host="box", version="1"
)
SETTINGS = {
    "beta": 0.05, "controller": "adaptive", "target": 6.0, "horizon": 1000.0, "beta_min": 0.01,
    "beta_max": 1.0, "learning_rate": 1e-5, "save_every": 50, "clip_range": 0.2, "epochs": 4,
    "stop_kl": None, "temperature": 1.0, "max_new_tokens": 64, "clip_range_high": None,
    "dual_clip": None, "entropy_coef": 0.0, "entropy_target": None, "loss_aggregation": "token",
    "micro_batch_size": 16,
}  # fmt: skip


def head(**given):
    base = SessionSummary("running", 50, 100, SETTINGS, "", [FIRST], 77, "box")
    return msgspec.structs.replace(base, **given)


def make_state(kl=6.0, **given):
    """Fifty steps of a run that goes on; `state.clock[0]` is the time."""
    clock = [1000.0]
    state = SessionState("run", now=lambda: clock[0])
    state.batch_size = 100
    curves = {
        "objective/kl": [(s, kl) for s in range(1, 51)],
        "objective/scores": [(s, s / 50) for s in range(1, 51)],
        "time/step": [(s, 10.0) for s in range(1, 51)],
        "time/generate": [(s, 6.0) for s in range(1, 51)],
    }
    state.take(SessionUpdate(head=head(**given), curves=curves, connected=True))
    state.clock = clock
    return state


def lines_of(rows):
    """The text of each row of pieces."""
    return ["".join(piece for piece, _ in row) for row in rows]


def text(panel, width=100, height=20):
    return "\n".join(lines_of(panel.rows(width, height)))


def command(status, **given):
    base = {
        "id": "1", "command": "beta", "args": {"value": 0.1}, "who": "ana on pts/1",
        "status": status, "queued": 1.0, "attempt": 1,
    }  # fmt: skip
    return CommandRow(**(base | given))
