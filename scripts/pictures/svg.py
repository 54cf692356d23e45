"""Screens as SVG: a picture, a sheet of pictures, an animation."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape

from scripts.pictures.cells import Cell, Colour, Style

WIDTH, HEIGHT, FONT = 8.4, 17, 14
"""Pixels of a cell, and of the font."""
FAMILY = "'DejaVu Sans Mono',Menlo,Consolas,'Liberation Mono',monospace"
FORE, BACK = "#d8d8d8", "#101010"
"""The terminal's own colours."""
XTERM = (
    "#000000", "#cd0000", "#00cd00", "#cdcd00", "#0000ee", "#cd00cd", "#00cdcd", "#e5e5e5",
    "#7f7f7f", "#ff0000", "#00ff00", "#ffff00", "#5c5cff", "#ff00ff", "#00ffff", "#ffffff",
)  # fmt: skip
"""The first sixteen colours as xterm has them. Other terminals differ."""
BRAILLE = frozenset(map(chr, range(0x2800, 0x2900)))
DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))
"""Column and row of a Braille dot by its bit."""
LEVELS = (0, 95, 135, 175, 215, 255)

Screen = Sequence[Sequence[Cell]]


def hex_of(colour: Colour, default: str) -> str:
    """A colour as `#rrggbb`."""
    match colour:
        case None:
            return default
        case int() if colour < 16:
            return XTERM[colour]
        case int() if colour < 232:
            n = colour - 16
            return "#{:02x}{:02x}{:02x}".format(*(LEVELS[n // d % 6] for d in (36, 6, 1)))
        case int():
            return "#{0:02x}{0:02x}{0:02x}".format(8 + 10 * (colour - 232))
        case _:
            return "#{:02x}{:02x}{:02x}".format(*colour)


@dataclass(frozen=True)
class Run:
    """Cells of one look in a row: a background, or text on it."""

    x: int
    y: int
    width: int
    look: str
    """Attributes of the element."""
    text: str = ""

    def svg(self) -> str:
        """The element."""
        if self.text and self.text[0] in BRAILLE:
            return f'<path d="{self._dots()}" {self.look}/>'
        x, y, width = f"{self.x * WIDTH:.4g}", self.y * HEIGHT, f"{self.width * WIDTH:.4g}"
        if not self.text:
            return f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" {self.look}/>'
        return (
            f'<text x="{x}" y="{y + 13}" textLength="{width}" {self.look}>'
            f"{escape(self.text)}</text>"
        )

    def _dots(self) -> str:
        """Braille as dots: fonts have it in other widths, or with circles for the unset ones."""
        dots = []
        for i, char in enumerate(self.text):
            for bit, (column, row) in enumerate(DOTS):
                if ord(char) - 0x2800 >> bit & 1:
                    x = (self.x + i + 0.25 + column / 2) * WIDTH
                    dots.append(f"M{x:.4g} {self.y * HEIGHT + 2 + row * HEIGHT / 4:.4g}h0")
        return "".join(dots)


def _colours(style: Style) -> tuple[str, str]:
    fore, back = hex_of(style.fore, FORE), hex_of(style.back, BACK)
    return (back, fore) if style.reverse else (fore, back)


def runs_of(screen: Screen) -> list[Run]:
    """The elements of a screen, backgrounds before text."""
    backs, texts = [], []
    for y, row in enumerate(screen):
        x = 0
        for back, group in groupby(row, key=lambda cell: _colours(cell.style)[1]):
            width = len(list(group))
            if back != BACK:
                backs.append(Run(x, y, width, f'fill="{back}"'))
            x += width
        x = 0
        for (style, braille), group in groupby(row, key=lambda c: (c.style, c.text in BRAILLE)):
            cells = list(group)
            if braille:
                text = "".join(cell.text for cell in cells)
                texts.append(Run(x, y, len(cells), f'stroke="{_colours(style)[0]}"', text))
                x += len(cells)
                continue
            texts += _texts(cells, style, x, y)
            x += len(cells)
    return [*backs, *texts]


def _texts(cells: Sequence[Cell], style: Style, x: int, y: int) -> list[Run]:
    """The words of a run; several blanks in a row need no element unless they are underlined."""
    look = f'fill="{_colours(style)[0]}"'
    look += ' font-weight="bold"' if style.bold else ""
    look += ' opacity=".6"' if style.dim else ""
    look += ' font-style="italic"' if style.italic else ""
    look += ' text-decoration="underline"' if style.underline else ""
    runs: list[Run] = []
    text = "".join(cell.text or "\0" for cell in cells)
    begin = 0
    parts = [text] if style.underline else text.split("  ")
    for part in parts:
        shown = part.replace("\0", "")
        lead = len(shown) - len(shown.lstrip()) if not style.underline else 0
        kept = part if style.underline else part.strip(" ")
        if kept.replace("\0", "") and (kept.strip() or style.underline):
            runs.append(Run(x + begin + lead, y, len(kept), look, kept.replace("\0", "")))
        begin += len(part) + 2
    return runs


def _frame(width: float, height: float, body: str, style: str = "") -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" '
        f'viewBox="0 0 {width:.5g} {height:.5g}" '
        f'width="{width:.5g}" height="{height:.5g}"><style>text{{white-space:pre;'
        f"font-size:{FONT}px;font-family:{FAMILY}}}path{{stroke-width:2.2;stroke-linecap:round}}"
        f"{style}</style>{body}</svg>\n"
    )


def _size(screen: Screen) -> tuple[float, float]:
    return max(map(len, screen)) * WIDTH, len(screen) * HEIGHT


def picture(screen: Screen) -> str:
    """A screen as an SVG document."""
    return sheet({"": screen}, 1)


def sheet(screens: dict[str, Screen], columns: int, gap: int = 12) -> str:
    """Screens by name, side by side and below one another."""
    size = [_size(screen) for screen in screens.values()]
    width, height = max(w for w, _ in size), max(h for _, h in size)
    title = HEIGHT if any(screens) else 0
    body = []
    for i, (name, screen) in enumerate(screens.items()):
        x, y = i % columns * (width + gap), i // columns * (height + title + gap)
        runs = "".join(run.svg() for run in runs_of(screen))
        label = f'<text y="13" fill="#ffffff">{escape(name)}</text>' if name else ""
        body.append(
            f'<g transform="translate({x:.5g} {y})">{label}<g transform="translate(0 {title})">'
            f'<rect width="{size[i][0]:.5g}" height="{size[i][1]}" fill="{BACK}"/>{runs}'
            "</g></g>"
        )
    across, down = min(columns, len(screens)), -(-len(screens) // columns)
    total = across * (width + gap) - gap, down * (height + title + gap) - gap
    ground = f'<rect width="{total[0]:.5g}" height="{total[1]}" fill="#4a5568"/>' if title else ""
    return _frame(*total, ground + "".join(body))


@dataclass(frozen=True)
class Frame:
    """A screen, and the seconds for which it is shown."""

    screen: Screen
    seconds: float


def animation(frames: Sequence[Frame], poster: int) -> str:
    """An animation that repeats, by CSS: it also plays as an image of a page.

    Elements that several frames share are in the file once.

    Args:
        frames: of one size.
        poster: the frame that is shown where nothing moves.
    """
    shown: dict[Run, list[int]] = {}
    order: dict[Run, int] = {}
    for number, frame in enumerate(frames):
        for place, run in enumerate(runs_of(frame.screen)):
            shown.setdefault(run, []).append(number)
            order.setdefault(run, place)
    groups: dict[tuple[int, ...], list[Run]] = {}
    # Backgrounds of all frames before all text, or a later one would cover it.
    for run in sorted(shown, key=lambda run: (bool(run.text), order[run])):
        groups.setdefault((int(bool(run.text)), *shown[run]), []).append(run)
    starts = [0.0]
    for frame in frames:
        starts.append(starts[-1] + frame.seconds)
    rules, body = [], []
    for i, (key, runs) in enumerate(sorted(groups.items(), key=lambda item: item[0][0])):
        numbers = set(key[1:])
        content = "".join(run.svg() for run in runs)
        if len(numbers) == len(frames):
            body.append(content)
            continue
        stops = [
            f"{starts[n] / starts[-1]:.3%}{{visibility:{'visible' if n in numbers else 'hidden'}}}"
            for n in range(len(frames))
            if n == 0 or (n in numbers) != (n - 1 in numbers)
        ]
        still = "visible" if poster in numbers else "hidden"
        rules.append(
            f"@keyframes k{i}{{{''.join(stops)}}}#g{i}{{visibility:{still};animation-name:k{i}}}"
        )
        body.append(f'<g id="g{i}">{content}</g>')
    sizes = [_size(frame.screen) for frame in frames]  # tmux leaves blanks out at a line's end
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    style = (
        f"g{{animation:{starts[-1]:.4g}s step-end infinite}}{''.join(rules)}"
        "@media(prefers-reduced-motion:reduce){g{animation:none}}"
    )
    back = f'<rect width="100%" height="100%" fill="{BACK}"/>'
    return _frame(width, height, back + "".join(body), style)
