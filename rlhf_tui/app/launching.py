"""Runs commands of the CLI: those that start engines, and `rm` and `export`."""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from textual.app import App
from textual.notifications import SeverityLevel

from engine.errors import RlhfError
from engine.session.folder import SessionFolder, all_sessions, find
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.context import AppContext
from rlhf_tui.state.messages import CommandResult, EngineStarted

if TYPE_CHECKING:  # imported when a form is opened
    from rlhf_tui.app.forms.start import StartForm
    from rlhf_tui.dialogs.form import Values

START_TIMEOUT = 10.0
"""Seconds within which the engine of a new session lives."""
POLL_INTERVAL = 0.3
OUTPUT_PREFIX = "rlhf-tui: "
"""Prefix of each line that the command line itself writes to its error output."""


class EngineStarter:
    """Starts, resumes and forks runs, each by a command in a separate process."""

    def __init__(self, app: App[None], context: AppContext) -> None:
        """Starts nothing yet.

        Args:
            app: takes :class:`EngineStarted`, and has timers and dialogs.
            context: the same app, as screens see it.
        """
        self._app = app
        self._context = context

    def _refused(self) -> bool:
        """Whether this terminal is read-only; shows a notice if so. Screens hide such keys."""
        if self._context.read_only:
            self._context.say("read-only: nothing can be started or deleted", "warning")
        return self._context.read_only

    def ask_new(self) -> None:
        """Asks for a configuration file, then starts a run from it."""
        from rlhf_tui.app.forms.start import new_run_form  # noqa: PLC0415 - keeps start-up short

        self._ask(lambda: new_run_form(self._context.root))

    def ask_resume(self, name: str, from_step: int | None = None) -> None:
        """Asks for overrides, then resumes a session.

        Args:
            name: of the session.
            from_step: the checkpoint's step; later steps become an abandoned branch. None: the
                last checkpoint.
        """
        from rlhf_tui.app.forms.start import resume_form  # noqa: PLC0415 - keeps start-up short

        self._ask(lambda: resume_form(self._context.root, name, from_step))

    def ask_fork(self, name: str, step: int) -> None:
        """Asks for a name and overrides, then forks `name` from the checkpoint of `step`."""
        from rlhf_tui.app.forms.start import fork_form  # noqa: PLC0415 - keeps start-up short

        self._ask(lambda: fork_form(self._context.root, name, step))

    def _ask(self, make: "Callable[[], StartForm]") -> None:
        """Opens a form and starts its run, or shows why the form cannot be opened."""
        if self._refused():
            return
        try:
            form = make()
        except RlhfError as error:
            self._context.say(str(error), "error")
            return

        def take(values: "Values | None") -> None:
            if values is not None:
                self.start(form.arguments(values), form.name(values))

        self._app.push_screen(form.dialog, take)

    def start(self, arguments: list[str], name: str) -> None:
        """Runs `rlhf-tui <arguments> --detach` in a thread; opens the session once it exists.

        Args:
            arguments: of the command.
            name: of the session that it starts.
        """
        if self._refused():
            return
        known = name in {s.name for s in all_sessions(self._context.root)}
        self._context.say(f"starting: rlhf-tui {' '.join(arguments)}")

        def run() -> None:
            result = self.run_cli([*arguments, "--detach"])
            self._app.post_message(EngineStarted(name, result))

        threading.Thread(target=run, daemon=True, name="start").start()
        # The dashboard is useful while the models are still loading.
        if known:
            self._context.open_session(name)
        else:
            self._open_when_created(
                name, self._app.current_mode, self._context.now() + START_TIMEOUT
            )

    def _open_when_created(self, name: str, mode: str, deadline: float) -> None:
        # Not before its engine runs, which may never be. A fork also locks it while it copies.
        session = SessionFolder(self._context.root / name)
        if session.may_be_live() and session.engine_file.exists():
            if self._takes_keys(mode):
                self._context.open_session(name)
        elif self._context.now() < deadline:
            again = functools.partial(self._open_when_created, name, mode, deadline)
            self._app.set_timer(POLL_INTERVAL, again)

    def _takes_keys(self, mode: str) -> bool:
        """Whether a mode's screen takes the keys, and no dialog over it.

        Otherwise a session that opens by itself would get keys that are meant for another screen.
        """
        return self._app.current_mode == mode and isinstance(self._app.screen, SessionScreen)

    def started(self, message: EngineStarted) -> None:
        """Shows the output of a start; on the sessions screen, opens the session."""
        result = message.result
        for notice in result.notices:
            self._context.say(notice, "warning")
        if result.problem:
            self._context.say(result.problem, "error")
            return
        if not self._is_live(message.name) and result.last_line:
            # The run has nothing left to do. The last line of the command explains why.
            self._context.say(result.last_line, "warning")
        elif self._context.state.name == message.name or not self._takes_keys("sessions"):
            self._context.say(f"'{message.name}' is running")
        else:
            self._context.open_session(message.name)

    def _is_live(self, name: str) -> bool:
        try:
            return find(self._context.root, name).is_live()
        except RlhfError:
            return False

    def run_command(self, arguments: list[str], done: str) -> None:
        """Runs `rlhf-tui <arguments>` in a thread; shows the error, or `done` when it succeeds."""
        if self._refused():
            return

        def run() -> None:
            result = self.run_cli(arguments)
            severity: SeverityLevel = "error" if result.problem else "information"
            self._app.call_later(self._context.say, result.problem or done, severity)

        threading.Thread(target=run, daemon=True, name=arguments[0]).start()

    def run_cli(self, arguments: list[str]) -> CommandResult:
        """Runs ``rlhf-tui`` and waits for its end. Call it in a thread."""
        where = ["--sessions", str(self._context.root)]
        done = subprocess.run(  # noqa: S603 - ourselves
            [sys.executable, "-P", "-m", "rlhf_tui.cli", *arguments, *where],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        last_line = (done.stdout.strip().splitlines() or [""])[-1]
        lines, problem = done.stderr.strip().splitlines(), ""
        if done.returncode:
            problem = lines.pop() if lines else f"exit code {done.returncode}"
        notices = [
            line.removeprefix(OUTPUT_PREFIX) for line in lines if line.startswith(OUTPUT_PREFIX)
        ]
        return CommandResult(problem.removeprefix(OUTPUT_PREFIX), last_line, notices)
