"""The view of a sample: text, token values, judgement, and comparison with another response."""

import math
from collections.abc import Sequence

from rich.cells import cell_len

from engine.journal.rows import SampleRow
from engine.protocol.rank_messages import TokenArrays
from rlhf_tui import format as fmt
from rlhf_tui.text import sanitise
from rlhf_tui.widgets.lines import Piece, Row, flowed
from rlhf_tui.widgets.samples.comparison import ComparisonTarget, comparison
from rlhf_tui.widgets.samples.heat import UNDEFINED, HeatScale
from rlhf_tui.widgets.samples.judgement import judgement_rows, key_of
from rlhf_tui.widgets.samples.turns import (
    INDENT,
    LEGEND,
    MARK,
    heading,
    reply_rows,
    reply_texts,
    response_rows,
)
from rlhf_tui.widgets.scroll_list import ScrollText
from rlhf_tui.widgets.wrap import wrap

VIEWS = ("text", "KL", "log-prob", "advantage", "value")
EXTREMES = {"log-prob": "least likely tokens", "value": "values furthest from their mean"}
"""Title of the tokens with the largest values, where it is not "largest" and the view's name."""
CENTRED = ("value",)
"""Views whose tones show the distance from the mean, not from 0."""
UNITS = {"KL": ", in nats", "log-prob": ", in nats"}
"""The unit in the title of a view."""
LONG_PROMPT, END_OF_PROMPT = 10, 4
"""A prompt of more than the first number of lines has only the second before the response."""


class SampleView(ScrollText):
    """Shows a sample. :attr:`mode` is one of :data:`VIEWS`."""

    with_scrollbar = True

    def __init__(self) -> None:
        super().__init__(id="sample")
        self.sample: SampleRow | None = None
        self.arrays: TokenArrays | None = None
        self.kept: Sequence[int] | None = None
        """Which samples of the step have token values, by index; None until it is read."""
        self.mode = VIEWS[0]
        self.beside: ComparisonTarget | None = None
        """The comparison that is shown with the text, if any."""

    def read(
        self,
        sample: SampleRow | None,
        arrays: TokenArrays | None = None,
        kept: Sequence[int] | None = None,
    ) -> None:
        """Shows a sample. Another sample ends the comparison.

        Args:
            sample: None for none.
            arrays: its token values; None: not kept, or not read yet.
            kept: indices of the step's samples that have token values; None until they are read.
        """
        same = (
            sample is not None and self.sample is not None and key_of(sample) == key_of(self.sample)
        )
        if not same:
            self.beside = None
        self.sample, self.arrays, self.kept = sample, arrays, kept
        self._lay_out(keep=same)

    def compare(self, beside: ComparisonTarget | None) -> None:
        """Starts, replaces or ends (None) a comparison."""
        if beside is None and self.beside is None:
            return
        keep = self.beside is not None and beside is not None and beside.kind == self.beside.kind
        self.beside = beside
        self._lay_out(keep=keep)

    @property
    def comparing(self) -> bool:
        """Whether a comparison is visible."""
        return self.beside is not None and self.mode == VIEWS[0]

    def cycle(self) -> None:
        """Switches to the next view."""
        self.mode = VIEWS[(VIEWS.index(self.mode) + 1) % len(VIEWS)]
        self._lay_out(keep=False)

    def as_text(self) -> None:
        """Switches to the text view."""
        self.mode = VIEWS[0]
        self._lay_out(keep=False)

    def on_resize(self) -> None:
        """Breaks the lines for the new width."""
        super().on_resize()
        self._lay_out(keep=True)

    def _lay_out(self, *, keep: bool) -> None:
        """Computes all lines for the current width."""
        width = max(self.size.width - 2, 10)
        if self.sample is None:
            self.set_body([[(" no response selected", "dim")]])
            return
        if self.beside is not None and self.comparing:
            lines = comparison(self.sample, self.beside, width)
        else:
            lines = body(self.sample, self.arrays, self.mode, width, self.kept)
        self.set_body([[(" ", ""), *row] for row in lines], keep=keep)


def body(
    sample: SampleRow,
    arrays: TokenArrays | None,
    mode: str,
    width: int,
    kept: Sequence[int] | None = None,
) -> list[Row]:
    """All lines of a sample in a view other than a comparison.

    Without `arrays` the response is plain text in every view, below which samples of the step have
    token values (`kept`, None: not known yet).
    """
    before, after = _prompt_rows(sample.prompt, width)
    rows = [*_number_rows(sample, width), [], *before, []]
    if mode != VIEWS[0] and arrays is not None:
        values = token_rows(arrays, mode, width, reply_texts(sample.response, sample.replies))
        return [*rows, *values, *after]
    if mode != VIEWS[0] and kept is not None:
        rows += [[(line, "warn")] for line in wrap(_not_kept(sample, kept), width)]
        rows.append([])
    response = response_rows(sample.response, sample.replies, width)
    return [*rows, heading(sample.replies), *response, *after]


def _number_rows(sample: SampleRow, width: int) -> list[Row]:
    """The numbers of a sample, its judgement, and the scores of each source and turn."""
    s = sample
    numbers: list[Row] = [
        [("score ", "dim"), (fmt.number(s.score), "strong")],
        [("KL ", "dim"), (f"{fmt.number(s.kl, 2)} nats", "strong")],
        [("length ", "dim"), (str(s.length), "strong")],
        [("ended", "dim") if s.ended else ("✂ cut off", "warn")],
    ]
    if s.replies is not None:
        numbers.insert(3, [("turns ", "dim"), (str(len(s.replies) + 1), "strong")])
    if s.weights_version is not None and s.weights_version < s.step - 1:
        numbers.append([("weights of step ", "dim"), (str(s.weights_version), "strong")])
    rows = [*flowed(numbers, width), *judgement_rows(s.judgement, width)]
    if len(s.parts) > 1 or (s.parts and s.held_out):  # of which one may be of `eval.rewards`
        parts = [[(f"{name} ", "dim"), (fmt.number(value), "")] for name, value in s.parts.items()]
        rows += flowed(parts, width)
    for name, scores in s.turn_scores.items():
        title = "by turn" if len(s.turn_scores) == 1 else f"{name} by turn"
        rows += flowed([[(title, "dim")], *([(fmt.number(x), "")] for x in scores)], width, "  ")
    return rows


def _prompt_rows(prompt: str, width: int) -> tuple[list[Row], list[Row]]:
    """The prompt in lines: those before the response, and those after it.

    Of a long one, such as the description of tools and a question, the end is before the response,
    and all of it after.
    """
    lines: list[Row] = [[(line, "dim")] for line in wrap(prompt, width)]
    title: Row = [("PROMPT", "dim")]
    if len(lines) <= LONG_PROMPT:
        return [title, *lines], []
    start: Row = [(f"… {len(lines) - END_OF_PROMPT} lines, see below", "dim")]
    return [title, start, *lines[-END_OF_PROMPT:]], [[], title, *lines]


def _not_kept(sample: SampleRow, kept: Sequence[int]) -> str:
    others = f"kept are {spans(kept)}" if kept else "none are of this step"
    return f"token values of #{sample.index} were not kept; {others} (log.arrays)"


def spans(numbers: Sequence[int]) -> str:
    """Increasing numbers in short: `#0–3 #7`."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return " ".join(f"#{a}" if a == b else f"#{a}–{b}" for a, b in found)


def values_of(arrays: TokenArrays, mode: str) -> list[float]:
    """The values of a view, one per token; empty if the run does not have them."""
    match mode:
        case "KL":
            return [p - r for p, r in zip(arrays.logprob, arrays.ref_logprob, strict=True)]
        case "log-prob":
            return arrays.logprob
        case "advantage":
            return arrays.advantage
        case _:
            return arrays.value


def token_rows(
    arrays: TokenArrays, mode: str, width: int, replies: Sequence[str] = ()
) -> list[Row]:
    """The response with its tokens coloured by value, then the tokens with the largest values.

    Values that are not finite come before the largest. The texts of `replies` are shown between the
    tokens, without values.
    """
    values = values_of(arrays, mode)
    if not values:
        return [[(f"{mode}: not measured in this run", "warn")]]
    scale = HeatScale.of(values, centred=mode in CENTRED)
    title = f"RESPONSE, {mode} of each token{UNITS.get(mode, '')}"
    legend = scale.legend(width)
    if replies:
        legend = flowed([*legend, [LEGEND]], width)
    rows: list[Row] = [[(title, "dim")], *legend]
    # The tokens are the policy's, in all turns.
    ends = [*arrays.before_replies[: len(replies)], len(values)]
    start = 0
    for number, end in enumerate(ends):
        if number:
            rows += reply_rows(replies[number - 1], width)
        tokens = list(zip(arrays.tokens[start:end], values[start:end], strict=True))
        if replies:
            rows += [[INDENT, *line] for line in _token_lines(tokens, scale, width - len(MARK))]
        else:
            rows += _token_lines(tokens, scale, width)
        start = end
    rows += [[], [(EXTREMES.get(mode, f"largest {mode}"), "dim")]]
    order = sorted(range(len(values)), key=lambda i: _order(values[i], scale))[:12]
    for i in order:
        rows.append(
            [
                (f"{i + 1:>4}  ", "dim"),
                (f"{round(values[i], 3) + 0.0:>8.3f} ", "strong"),
                _bar(values[i], scale),
                (f" {arrays.tokens[i]!r}", ""),
            ]
        )
    return rows


def _token_lines(
    tokens: Sequence[tuple[str, float]], scale: HeatScale, width: int
) -> list[list[Piece]]:
    """Tokens in the tones of their values, in lines of at most `width` cells if they fit."""
    lines: list[list[Piece]] = []
    line: list[Piece] = []
    used = 0
    for token, value in tokens:
        pieces = sanitise(token).replace("\t", " ").split("\n")
        for i, piece in enumerate(pieces):
            shown = piece + ("␤" if i < len(pieces) - 1 else "")
            if used + cell_len(shown) > width:
                lines.append(line)
                line, used = [], 0
            line.append((shown, scale.tone(value)))
            used += cell_len(shown)
            if i < len(pieces) - 1:
                lines.append(line)
                line, used = [], 0
    return [*lines, line] if line else lines


def _order(value: float, scale: HeatScale) -> float:
    return -abs(scale.share(value)) if math.isfinite(value) else -math.inf


def _bar(value: float, scale: HeatScale) -> Piece:
    if not math.isfinite(value):
        return "?" * 12, UNDEFINED
    share = scale.share(value)
    cells = round(abs(share) * 12)
    return "█" * cells + " " * (12 - cells), "above" if share >= 0 else "below"
