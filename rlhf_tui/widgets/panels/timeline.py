"""The timeline (interventions, alerts, checkpoints, notes) and the newest responses."""

from rlhf_tui import format as fmt
from rlhf_tui.state.session_state import MARKER_GLYPHS, MARKER_TONES, Marker
from rlhf_tui.widgets.lines import Row, justified
from rlhf_tui.widgets.panels.panel import Panel, heading


class TimelinePanel(Panel):
    """One line per marker, newest first."""

    def rows(self, width: int, height: int) -> list[Row]:
        """The newest markers, as many as fit."""
        markers = self.state.markers()
        top = heading("What happened", "n N jump  w note" if width >= 40 else "n N", width)
        if not markers:
            return [top, [(" nothing yet: changes, alerts and checkpoints appear here", "dim")]]
        return [top, *(_row(m, width) for m in reversed(markers[-(height - 1) :]))]


def _row(marker: Marker, width: int) -> Row:
    tone = MARKER_TONES[marker.kind]
    left: Row = [
        (f" {marker.step:>6} ", "dim"),
        (f"{MARKER_GLYPHS[marker.kind]} ", tone),
        (marker.text, tone if marker.kind == "alert" else ""),
    ]
    who = marker.who.split(" ")[0]
    return justified(left, [(f" {who} ", "dim")], width) if who else left


class LatestSamplesPanel(Panel):
    """The responses of the newest step, in the order of their prompts, as many as fit."""

    def rows(self, width: int, height: int) -> list[Row]:
        """Score, KL and length, then the end of the prompt and the response."""
        samples = self.state.samples
        step = samples[-1].step if samples else 0
        title = f"Newest responses, step {step}" if samples else "Newest responses"
        top = heading(title, "3 read" if width >= 40 else "3", width)
        if not samples:
            return [top, [(" none yet: they appear with the first step", "dim")]]
        newest = [s for s in samples if s.step == step]
        rows: list[Row] = []
        for s in newest[: height - 1]:
            score, kl = s.score, s.kl
            rows.append(
                [
                    (f" {fmt.number(score, 2):>7}", "strong"),
                    (f" {fmt.number(kl, 1):>6}" if width >= 60 else "", "dim"),
                    (f" {s.length:>3}" if width >= 60 else "", "dim"),
                    ("  " if s.ended else " ✂", "warn"),
                    (" ", ""),
                    (s.prompt.strip()[-max(width // 4, 8) :], "dim"),
                    ("│", "dim"),
                    (s.response.strip(), ""),
                ]
            )
        return [top, *rows]
