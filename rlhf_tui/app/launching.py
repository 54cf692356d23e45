"""Commands of our own that the app runs: those that start engines, and those that tidy up."""

import os
import subprocess
import sys
import threading

from engine.errors import RlhfError
from engine.session.folder import all_sessions, find
from rlhf_tui.app.following import Follower
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.state.messages import EngineStarted
from rlhf_tui.widgets.lines import Row

APPEARS = 10.0
"""Seconds within which a new session's folder is there."""


class Launch(Follower, inherit_bindings=False):
    """The app as far as it starts engines and runs commands."""

    def refuse_read_only(self) -> bool:
        """Whether nothing may be done from here; says so."""
        if self.read_only:
            self.say("read-only: nothing can be started or deleted from here", "warning")
        return self.read_only

    def ask_fork(self, name: str, step: int) -> None:
        """The name of a branch off a checkpoint."""
        if self.refuse_read_only():
            return
        # Imported here to keep the start of the app quick.
        from rlhf_tui.screens.checkpoints import check_new_name, fork_name  # noqa: PLC0415

        rows: list[Row] = [[(f"A new session that shares {name} up to step {step}.", "dim")]]

        def take(new: str | None) -> None:
            if new:
                self.start_engine(["fork", name, "--from", str(step), "--name", new], new)

        def check(text: str) -> tuple[bool, str]:
            return check_new_name(self.root, text)

        self.push_screen(
            InputDialog(f"Branch off {name}, step {step}", rows, fork_name(self.root, name), check),
            take,
        )

    def start_engine(self, arguments: list[str], name: str) -> None:
        """`rlhf-tui …  --detach` in a thread; opens the session once it is there."""
        if self.refuse_read_only():
            return
        before = {s.name for s in all_sessions(self.root)}
        self.say(f"starting: rlhf-tui {' '.join(arguments)}")

        def start() -> None:
            problem, said = self._run([*arguments, "--detach"])
            new = {s.name for s in all_sessions(self.root)} - before
            self.post_message(EngineStarted(name or next(iter(sorted(new)), ""), problem, said))

        threading.Thread(target=start, daemon=True, name="start").start()
        # Worth seeing while its models are still being loaded.
        if name in before:
            self.open_session(name)
        else:
            self._open_when_there(before, self.now() + APPEARS)

    def _open_when_there(self, before: set[str], deadline: float) -> None:
        """Opens a new session as soon as its folder is there."""
        new = sorted({s.name for s in all_sessions(self.root)} - before)
        if new:
            self.open_session(new[0])
        elif self.now() < deadline:
            self.set_timer(0.3, lambda: self._open_when_there(before, deadline))

    def on_engine_started(self, message: EngineStarted) -> None:
        """An engine has started, or could not."""
        if message.problem:
            self.say(message.problem, "error")
            return
        if not self._runs(message.name) and message.said:
            # It had nothing to do, or is done already: the command knows which.
            self.say(message.said, "warning")
        elif self.state.name == message.name or self.current_mode != "sessions":
            self.say(f"'{message.name}' runs")
        elif message.name:
            self.open_session(message.name)

    def _runs(self, name: str) -> bool:
        try:
            return find(self.root, name).is_live()
        except RlhfError:
            return False

    def run_command(self, arguments: list[str], done: str) -> None:
        """Another command of ours, in a thread; says how it ended."""
        if self.refuse_read_only():
            return

        def run() -> None:
            problem, _ = self._run(arguments)
            self.say_later(problem or done, "error" if problem else "information")

        threading.Thread(target=run, daemon=True, name=arguments[0]).start()

    def _run(self, arguments: list[str]) -> tuple[str, str]:
        """Runs ``rlhf-tui``; its last line of complaint, empty where it went well, and of words."""
        where = ["--sessions", str(self.root)]
        done = subprocess.run(  # noqa: S603 - ourselves
            [sys.executable, "-m", "rlhf_tui.cli", *arguments, *where],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        said = (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode == 0:
            return "", said
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1].removeprefix("rlhf-tui: "), said
