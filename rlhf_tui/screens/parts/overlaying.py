"""Overlays other runs on the charts of the open one."""

import functools
from collections.abc import Callable

from textual.message import Message
from textual.worker import get_current_worker

from engine.errors import RlhfError
from engine.session.folder import SessionFolder, all_sessions, find
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.context import AppContext
from rlhf_tui.state.runs.overlay import (
    ALIGNMENTS,
    Overlay,
    RunClock,
    overlaid,
    read_clocks,
    read_overlay,
)


class OverlaysRead(Message):
    """Other runs were read, to be drawn over the open one."""

    def __init__(
        self, session: SessionFolder, overlays: list[Overlay], clocks: dict[str, RunClock]
    ) -> None:
        super().__init__()
        self.session, self.overlays, self.clocks = session, overlays, clocks
        """`clocks`: of the open run."""


class RunOverlays:
    """Reads the runs that the viewport wants overlaid, and aligns them with the open one."""

    def __init__(
        self, screen: SessionScreen, context: AppContext, draw: Callable[[], None]
    ) -> None:
        """For a screen with charts, which receives :class:`OverlaysRead`; `draw` draws them."""
        self._screen = screen
        self._context = context
        self._draw = draw
        self._asked: object = None
        """The open session, the runs and the metrics that were asked for last."""
        self._read: OverlaysRead | None = None

    def refresh(self) -> None:
        """Reads the wanted runs if the wanted runs or metrics have changed."""
        session, view = self._context.session, self._context.view
        if session is None:
            return
        names = self._context.preferences.metrics()
        asked = session.folder, tuple(view.wanted), tuple(names)
        if asked == self._asked:
            return
        self._asked, self._read = asked, None
        view.others = {n: curves for n, curves in view.others.items() if n in view.wanted}
        if view.wanted:
            read = functools.partial(self._read_all, session, list(view.wanted), names)
            self._screen.read_in_thread("overlays", read)

    def _read_all(
        self, session: SessionFolder, wanted: list[str], names: list[str]
    ) -> OverlaysRead | None:
        """Reads journals, in a worker thread; None if it is cancelled."""
        found = []
        for name in wanted:
            if get_current_worker().is_cancelled:
                return None
            try:
                found.append(read_overlay(find(self._context.root, name), names))
            except RlhfError as error:
                found.append(Overlay(name, problem=str(error)))
        return OverlaysRead(session, found, read_clocks(session.at(None)))

    def take(self, message: OverlaysRead) -> None:
        """Shows the runs that were read, unless another session was opened meanwhile."""
        if message.session != self._context.session:
            return
        self._read = message
        for overlay in message.overlays:
            if overlay.problem:
                self._context.say(overlay.problem, "error")
        self._align()

    def _align(self) -> None:
        view = self._context.view
        if self._read is not None:
            view.others = overlaid(self._read.overlays, self._read.clocks, view.alignment)
            self._draw()

    # -- keys ----------------------------------------------------------------------------------

    def choose(self) -> None:
        """Asks which runs are overlaid."""
        from rlhf_tui.dialogs.picker import Option, PickerDialog  # noqa: PLC0415 - start-up

        state, view = self._context.state, self._context.view
        names = [s.name for s in all_sessions(self._context.root) if s.name != state.name]
        if not names:
            self._context.say(f"there is no other session in {self._context.root}")
            return
        options = [Option(n, n, "shown" if n in view.others else "") for n in names]
        marked = [[name] for name in view.wanted]

        def take(result: str | None) -> None:
            if result is not None:
                view.wanted = result.split("\n") if result else []
                self.refresh()
                self._draw()

        title = f"Overlay on {state.name}"
        dialog = PickerDialog(title, options, marked, joins=False)
        self._screen.app.push_screen(dialog, take)

    def next_alignment(self) -> None:
        """Aligns by the next of :data:`ALIGNMENTS`."""
        view = self._context.view
        view.alignment = ALIGNMENTS[(ALIGNMENTS.index(view.alignment) + 1) % len(ALIGNMENTS)]
        wanted = len(view.wanted)
        self._align()
        text = f"overlaid runs are aligned by {view.alignment}"
        if len(view.others) < wanted and self._read is not None:
            text += f"; {wanted - len(view.others)} of {wanted} did not record it"
        self._context.say(text)
