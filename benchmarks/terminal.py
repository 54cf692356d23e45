"""Measures latency, output and memory of the dashboard in a pseudo-terminal.

    python benchmarks/terminal.py [--steps 100000] [--metrics 40] [--seconds 15]

Writes a session of this size. Then starts a minimal Textual app and the dashboard (`rlhf-tui
attach`) in turn, several times each, and measures the time to the first frame; ratios are medians
over the pairs. Finally a simulated engine, which uses the real protocol, advances the session by
one step and four phase reports per second.
"""

import argparse
import fcntl
import math
import os
import pty
import select
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engine import starter
from engine.config import file as config_file
from engine.journal.writer import JournalWriter
from engine.protocol import frames, sockets
from engine.protocol.client_messages import JournalAdvanced, Status, Welcome
from engine.protocol.rank_messages import Phase, StepReport
from engine.session.folder import SessionFolder, create

SIZE = (120, 40)
BARE = """
from textual.app import App
from textual.widgets import Static
class Bare(App):
    def compose(self):
        yield Static("READY")
Bare().run()
"""
MAIN = ("objective/scores", "objective/kl", "objective/kl_coef", "policy/clipfrac_avg")
SETTINGS = {
    "beta": 0.05, "controller": "adaptive", "target": 6.0, "horizon": 10000.0, "beta_min": 1e-4,
    "beta_max": 10.0, "learning_rate": 1e-5, "save_every": 50, "clip_range": 0.2, "epochs": 4,
    "stop_kl": None, "temperature": 1.0, "max_new_tokens": 64, "clip_range_high": None,
    "dual_clip": None, "entropy_coef": 0.0, "loss_aggregation": "token",
}  # fmt: skip


class Screen:
    """A program in a pseudo-terminal."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", SIZE[1], SIZE[0], 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        environment |= {"XDG_CONFIG_HOME": str(home / "c"), "XDG_STATE_HOME": str(home / "s")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program is compiled
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            arguments, stdin=slave, stdout=slave, stderr=slave, env=environment,
            start_new_session=True,
        )  # fmt: skip
        os.close(slave)

    def read(self, seconds: float) -> bytes:
        """Reads the first output within that time; b"" after a timeout or at the end."""
        if not select.select([self.master], [], [], max(seconds, 0))[0]:
            return b""
        try:
            return os.read(self.master, 1 << 16)
        except OSError:
            return b""

    def wait_for(self, condition: Callable[[bytes], bool], seconds: float = 30.0) -> float:
        """Waits until the output satisfies a condition; returns the seconds since the start.

        Raises:
            TimeoutError: the condition is not satisfied in time.
        """
        data = b""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            data += self.read(0.05)
            if condition(data):
                return time.perf_counter() - self.began
        raise TimeoutError(data[-500:])

    def count(self, seconds: float) -> int:
        """Counts the bytes of output within that time."""
        end, total = time.perf_counter() + seconds, 0
        while (left := end - time.perf_counter()) > 0:
            total += len(self.read(left))
        return total

    def cpu(self) -> float:
        """Processor time so far, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Resident memory in MB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS")) / 1000

    def key(self, key: bytes) -> float:
        """Waits for a pause in the output, presses a key, and returns the seconds to the output."""
        while self.read(0.08):
            continue
        began = time.perf_counter()
        os.write(self.master, key)
        while not self.read(1.0):
            continue
        return time.perf_counter() - began

    def type(self, text: bytes) -> None:
        """Sends keys."""
        os.write(self.master, text)

    def close(self) -> None:
        """Kills the program."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


def write_session(root: Path, steps: int, metrics: int, name: str = "long") -> SessionFolder:
    """Writes a long session with SQL; the journal's own methods would take minutes."""
    config = config_file.load(starter.FOLDER / "demo.yaml", [f"train.steps={steps + 1000}"])
    session = create(root, name, config)
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    journal.set_meta(state="running", total_steps=steps + 1000, message="", settings=SETTINGS)
    journal.close()
    names = [*MAIN, *(f"other/metric_{i}" for i in range(metrics - len(MAIN)))]
    db = sqlite3.connect(session.journal_file)
    with db:
        db.executemany("INSERT INTO names VALUES (?, ?)", list(enumerate(names, start=1)))
        db.executemany(
            "INSERT INTO steps VALUES (?, 1, ?)", ((s, 1.7e9 + s) for s in range(1, steps + 1))
        )
        for i in range(1, metrics + 1):
            db.executemany(
                "INSERT INTO metrics VALUES (?, ?, ?)",
                (
                    (i, s, math.sin(s / 900 + i) + (s * 7919 % 101) / 400)
                    for s in range(1, steps + 1)
                ),
            )
    db.close()
    return session


class Engine:
    """A simulated engine: holds the lock, writes steps, and notifies the watching clients."""

    def __init__(self, session: SessionFolder) -> None:
        self.session = session
        self.lock = session.acquire()
        self.step = 0
        self.server, path = sockets.listen(session.folder)
        session.write_engine(str(path), "benchmark")
        self.watchers: list[socket.socket] = []
        self.stopped = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self.stopped.is_set():
            try:
                sock, _ = self.server.accept()
            except OSError:
                return
            status = Status(
                state="running", step=self.step, total_steps=0, attempt=1,
                settings=SETTINGS, phases=[], boundary_in=None,
                telemetry=None, watchers=1, pid=os.getpid(),
            )  # fmt: skip
            sock.sendall(frames.encode(Welcome(pid=os.getpid())) + frames.encode(status))
            self.watchers.append(sock)

    def run(self, seconds: float) -> None:
        """Writes one step and sends four phase reports per second."""
        journal = JournalWriter(self.session)
        for tick in range(int(seconds * 4)):
            if self.stopped.is_set():
                break
            step = self.step = journal.step
            if tick % 4 == 3:
                step += 1
                wave = math.sin(step / 900)
                values = dict.fromkeys(MAIN, wave) | {"time/step": 1.0, "time/generate": 0.6}
                journal.record_step(
                    StepReport(step=step, metrics=values, samples=[], settings=SETTINGS)
                )
                self._publish(JournalAdvanced(step=step, event=1, state="running"))
            name = ("generate", "generate", "reference", "optimise")[tick % 4]
            self._publish(Phase(rank=0, step=step + 1, name=name, done=tick % 4 * 25, total=100))
            time.sleep(0.25)

    def _publish(self, message: frames.Message) -> None:
        for sock in self.watchers:
            sock.sendall(frames.encode(message))


def has_curves(data: bytes) -> bool:
    """Whether the output contains a curve, that is, Braille patterns (from U+2800)."""
    return b"\xe2\xa0" in data or b"\xe2\xa1" in data or b"\xe2\xa2" in data


def main() -> None:
    """Runs all measurements and prints the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--metrics", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


def measure(home: Path, options: argparse.Namespace) -> None:
    """Prints one result per line."""
    session = write_session(home / "sessions", options.steps, options.metrics)
    size = session.journal_file.stat().st_size / 1e6
    print(f"session        {options.steps:,} steps x {options.metrics} metrics, {size:.0f} MB")
    print(f"terminal       {SIZE[0]}x{SIZE[1]}")
    ours = [sys.executable, "-m", "rlhf_tui.cli", "attach", "long"]
    ours += ["--sessions", str(home / "sessions")]
    bare_times, frame_times, curve_times = [], [], []
    for _ in range(options.times):
        screen = Screen([sys.executable, "-c", BARE], home)
        bare_times.append(screen.wait_for(lambda data: b"READY" in data))
        screen.close()
        screen = Screen(ours, home)
        frame_times.append(screen.wait_for(lambda data: b"Dashboard" in data))
        curve_times.append(screen.wait_for(has_curves))
        screen.close()
    measured = {"bare Textual": bare_times, "first frame": frame_times, "first curve": curve_times}
    for name, times in measured.items():
        median = statistics.median(times)
        ratio = statistics.median(a / b for a, b in zip(times, bare_times, strict=True))
        print(f"{name:<14} {median:.2f} s ({min(times):.2f} to {max(times):.2f}), "
              f"{ratio:.2f} x bare")  # fmt: skip
    engine = Engine(session)
    screen = Screen(ours, home)
    screen.wait_for(has_curves)
    screen.count(3.0)
    writer = threading.Thread(target=engine.run, args=(options.seconds + 12,), daemon=True)
    writer.start()
    screen.count(2.0)
    cpu, clock = screen.cpu(), time.perf_counter()
    sent = screen.count(options.seconds)
    took = time.perf_counter() - clock
    print(f"live processor {100 * (screen.cpu() - cpu) / took:.1f} % of one core")
    print(f"live bytes     {sent / took:,.0f} per second")
    keys = [screen.key(key) for key in (b"g", b"G") * 10]
    print(f"key to paint   {1000 * statistics.median(keys):.0f} ms, at most {1000 * max(keys):.0f}")
    print(f"memory         {screen.memory():.0f} MB")
    engine.stopped.set()
    writer.join()
    screen.close()


if __name__ == "__main__":
    main()
