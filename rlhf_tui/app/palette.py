"""The commands of the palette: every key of every screen, and the themes, each described."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, cast

from msgspec import Struct
from textual import events
from textual.binding import Binding
from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.content import Content
from textual.dom import DOMNode
from textual.screen import Screen

from rlhf_tui.dialogs.help import hidden_actions
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.modes import MODES, screen_class
from rlhf_tui.state.preferences import THEME_NAMES
from rlhf_tui.widgets.key_footer import key_name

DESCRIPTIONS = {
    "judge": "judge responses that have no judgement, one after another",
    # of the app
    "steer('pause')": "hold the run after the current step; its engine stays up",
    "steer('unpause')": "let a paused run continue",
    "steer('beta')": "set beta, the KL coefficient",
    "steer('lower_beta')": "lower beta, the KL coefficient, by a tenth",
    "steer('raise_beta')": "raise beta, the KL coefficient, by a tenth",
    "steer('adaptive')": "switch between the adaptive KL controller and a fixed beta",
    "steer('undo')": "take back the last change of a setting",
    "steer('change')": "set the learning rate, clip range, target or another setting",
    "steer('save')": "save a checkpoint after the current step",
    "steer('note')": "write a note, which is shown on the charts",
    "steer('probe')": "generate responses of policy and reference to your prompt",
    "steer('stop')": "end the run, with or without a checkpoint; asks first",
    "theme": "switch between dark, light and contrast colours",
    "help": "list every key of this screen",
    "detach": "quit this app; the engine keeps running",
    "go('sessions')": "the screen of all sessions",
    "go('dashboard')": "the screen of curves and steering",
    "go('samples')": "the screen of responses, to read, compare and label",
    "go('checkpoints')": "the screen of checkpoints, to roll back, fork and export",
    "go('log')": "the screen of the engine's output",
    "app.focus_next": "move the focus to the next panel",
    "app.focus_previous": "move the focus to the previous panel",
    # of a replay
    "replay('toggle')": "pause the replay, or play on",
    "replay('slower')": "replay slower",
    "replay('faster')": "replay faster",
    "replay('previous')": "move the replay to the previous change, alert, note, start or crash",
    "replay('next')": "move the replay to the next change, alert, note, start or crash",
    # of sessions
    "new": "start the demo run; asks first",
    "new_from_file": "start a run from a configuration file in YAML",
    "resume": "resume the run from its last checkpoint, also with other settings",
    "fork": "start a new session from a checkpoint, with other settings",
    "delete": "delete the session with its checkpoints; asks first",
    "mark_session": "mark the session, to overlay or to compare it with others",
    "mark_matching": "mark the sessions whose names match a regular expression",
    "overlay": "open the session with the curves of all marked ones over its own",
    "metric": "choose the metric whose values are listed and drawn as a sparkline",
    "settings": "show the settings in which the marked sessions, or all, differ",
    "choose": "open or select the row under the cursor",
    # of checkpoints
    "roll_back": "return the run to a checkpoint, settings included; asks first",
    "delete_checkpoint": "delete the checkpoint; asks first",
    "export": "write the policy of a checkpoint as a Hugging Face model folder",
    # of the dashboard
    "cursor(-1)": "move the crosshair to an earlier step",
    "cursor(1)": "move the crosshair to a later step",
    "cursor(-10)": "move the crosshair left by ten cells",
    "cursor(10)": "move the crosshair right by ten cells",
    "cursor_to(0)": "move the crosshair to the first step",
    "cursor_to(1)": "move the crosshair to the newest step",
    "marker(1)": "move the crosshair to the next change, alert, checkpoint or note",
    "marker(-1)": "move the crosshair to the previous change, alert, checkpoint or note",
    "chart(1)": "move the focus to the next chart",
    "chart(-1)": "move the focus to the previous chart",
    "zoom(0.5)": "show half as many steps",
    "zoom(2.0)": "show twice as many steps",
    "pan(-0.5)": "show earlier steps",
    "pan(0.5)": "show later steps",
    "fit": "show all steps of the run",
    "enlarge": "show this panel on the full screen, or all of them again",
    "open": "open the selected event; without one, show this chart on the full screen",
    "metrics": "choose which metrics have a chart",
    "columns": "change the number of chart columns",
    "log": "switch the chart between a linear and a logarithmic scale",
    "smooth": "change the smoothing of the curves",
    "past": "show or hide the curves of abandoned branches",
    "others": "draw the curves of other sessions over these",
    "align": "align overlaid sessions by step, by responses so far or by hours of training",
    "page": "show the next panel beside the charts",
    "back": "leave one level: full screen, crosshair, zoom, filter or search",
    # of samples
    "filter": "filter responses by text, score, KL or label",
    "view": "switch between the response and its tokens with KL, value and advantage",
    "next(1)": "go to the next response",
    "next(-1)": "go to the previous response",
    "page(1)": "go to the next page",
    "page(-1)": "go to the previous page",
    "sort": "sort the list by its next column",
    "reverse": "switch between ascending and descending order",
    "label('good')": "label the response good, or remove that label",
    "label('bad')": "label the response bad, or remove that label",
    "label('hack')": "label the response as reward hacking, or remove that label",
    "show_new": "show the responses that arrived while the list was kept still",
    "same_prompt": "show all responses to the prompt of this one",
    "held_out": "switch between training responses and those to held-out prompts (evaluation)",
    "probes": "read the probes of this run again",
    "remark": "write a note on the response",
    "compare": "compare the response with the reference's or an earlier one",
    "better('this')": "prefer this response to the one it is compared with",
    "better('other')": "prefer the other response to this one",
    "other(-1)": "compare with a newer response",
    "other(1)": "compare with an older response",
    "other(-200)": "compare with the newest of the other responses",
    "other(200)": "compare with the first response to this prompt",
    # of the log
    "search": "search the text of the log",
    "match(1)": "go to the next match",
    "match(-1)": "go to the previous match",
    "shift(20)": "scroll to the right",
    "shift(-20)": "scroll to the left",
    # of lists
    "move(1)": "move down by a line",
    "move(-1)": "move up by a line",
    "edge(0)": "go to the first line",
    "edge(1)": "go to the last line",
}
"""Action → what it does, in a line."""
TITLES = {"app.focus_next": "next panel", "app.focus_previous": "previous panel"}
"""Action of Textual → its title here."""
DESCRIPTION_BONUS = 1000.0
"""Added to the score of a command whose description has the words, and twice if its title has them.
Textual's score of single letters is far below it."""


class PaletteApp(Protocol):
    """The app as its palette sees it."""

    def choose_theme(self, name: str) -> None:
        """Sets the theme."""

    def on_key(self, event: events.Key) -> None:
        """Shows why a key does nothing."""

    def say(self, text: str) -> None:
        """Shows a notice."""


class PaletteCommand(Struct, frozen=True):
    """A line of the palette."""

    title: str
    help: str
    run: Callable[[], Any]
    rank: int = 2
    """Its rank while nothing is typed: 0 first, 1 for the keys that the footer may show, 3 for
    disabled ones."""


class PaletteCommands(Provider):
    """Finds commands by the words of their title and of their description."""

    def __init__(self, screen: Screen[Any], match_style: Any = None) -> None:
        super().__init__(screen, match_style)
        self._ran = False

    async def discover(self) -> Hits:
        """All commands: first those of the screen, its less common ones last."""
        for command in self.commands():
            yield DiscoveryHit(command.title, partial(self._once, command), help=command.help)

    async def search(self, query: str) -> Hits:
        """The commands whose title is like the query, or that have all of its words."""
        matcher, words = self.matcher(query), query.lower().split()
        begin = [re.compile(rf"\b{re.escape(word)}") for word in words]
        for command in self.commands():
            score = matcher.match(command.title)
            name, text = command.title.lower(), f"{command.title} {command.help}".lower()
            if score <= 0 and not all(word in text for word in words):
                continue
            title = matcher.highlight(command.title) if score > 0 else Content(command.title)
            # Else letters of the title in this order, or a part of a word, which are only a hint.
            if all(word.search(text) for word in begin):
                score += (
                    2 * DESCRIPTION_BONUS
                    if all(word.search(name) for word in begin)
                    else DESCRIPTION_BONUS
                )
            score = max(score, 0.5)
            yield Hit(score, title, partial(self._once, command), command.title, command.help)

    async def _once(self, command: PaletteCommand) -> None:
        """Runs the selected command; a second enter, typed ahead, does not run it again."""
        if not self._ran:
            self._ran = True
            result = command.run()
            if result is not None:
                await result

    def commands(self) -> Iterator[PaletteCommand]:
        """The commands of this screen and of the app, those of the other screens, the themes."""
        app = cast(PaletteApp, self.app)
        yield from sorted(self._of_this_screen(), key=lambda command: command.rank)
        if not isinstance(self.screen, SessionScreen):
            return  # a dialog
        for mode in MODES:
            if mode != self.screen.MODE:
                yield from self._of_screen(mode)
        for name in THEME_NAMES:
            choose = partial(app.choose_theme, name)
            yield PaletteCommand(f"Theme: {name}", "colours of this app", choose)

    def _of_this_screen(self) -> list[PaletteCommand]:
        from textual.widgets import Input  # noqa: PLC0415 - keeps the start quick

        left_out = hidden_actions(self.screen)
        found: dict[str, PaletteCommand] = {}
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if not binding.description or binding.system or binding.action in left_out:
                continue
            if isinstance(active.node, Input):  # the keys that edit its text
                continue
            title = TITLES.get(binding.action, binding.description)
            # Enter runs the first one at once, so it must be harmless.
            rank = 0 if binding.action == "help" else 1 if binding.show else 2
            rank = rank if active.enabled else 3
            if binding.action in found and found[binding.action].rank <= rank:
                continue  # of several keys, the one that the footer shows
            found[binding.action] = PaletteCommand(
                title[0].upper() + title[1:],
                described(binding, ""),
                partial(self._run_or_explain, binding, active.node),
                rank,
            )
        return list(found.values())

    def _of_screen(self, mode: str) -> Iterator[PaletteCommand]:
        """The commands of another screen. They only show that screen and name the key there."""
        number, found = list(MODES).index(mode) + 1, set[str]()
        for binding in Binding.make_bindings(screen_class(mode).BINDINGS):
            if binding.description and binding.action not in {"back", *found}:
                found.add(binding.action)
                title = f"{mode.capitalize()}: {binding.description}"
                run = partial(self._go, mode, binding)
                yield PaletteCommand(title, described(binding, f"{number} "), run)

    async def _go(self, mode: str, binding: Binding) -> None:
        await self.app.run_action(f"go('{mode}')")
        if self.app.current_mode == mode:
            key = binding.key_display or key_name(binding.key)
            what = DESCRIPTIONS.get(binding.action, binding.description)
            cast(PaletteApp, self.app).say(f"{key} here: {what}")

    async def _run_or_explain(self, binding: Binding, node: DOMNode) -> None:
        """Runs an action, or shows why it is disabled."""
        if not await self.app.run_action(binding.action, node):
            cast(PaletteApp, self.app).on_key(events.Key(binding.key, None))


def described(binding: Binding, before: str) -> str:
    """What a key does, and the key; `before` is pressed before it."""
    what = DESCRIPTIONS.get(binding.action, binding.description)
    key = binding.key_display or key_name(binding.key)
    return f"{what} · key {before}{key}"
