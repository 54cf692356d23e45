"""The newest responses."""

from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.panels.panel import Panel, heading


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
