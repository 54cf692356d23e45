"""Places the panel of a table's selected row: beside the table, below it, or nowhere."""

from textual.geometry import Size
from textual.widget import Widget

from rlhf_tui.widgets.table import Table

MIN_WIDTH_BESIDE = 170
MIN_HEIGHT_BELOW = 34
"""Lines of a terminal from which on the panel is below any table."""
OTHER_LINES = 16
"""Lines of the screen besides the table if the panel has its minimum height. On a lower terminal,
the panel is below a table that leaves room for it."""
MIN_TABLE_ROWS = 6
"""Minimum height of a table with the panel below it."""


def place_panel(
    container: Widget, table: Table, screen: Size, *, min_height_beside: int = 0
) -> None:
    """Sets the class of the container, by which app.tcss places the panel, and the table's height.

    The class is `beside` or `below`, in a low terminal also `low`. The panel of an empty table is
    hidden.

    Args:
        container: holds the table and the panel.
        table: the table.
        screen: size of the screen.
        min_height_beside: minimum lines of the screen for a panel beside the table.
    """
    has_rows = bool(table.count())
    beside = has_rows and screen.width >= MIN_WIDTH_BESIDE and screen.height >= min_height_beside
    rows = max(table.count() + 1, MIN_TABLE_ROWS)
    low = screen.height < MIN_HEIGHT_BELOW
    below = has_rows and not beside and (not low or screen.height >= rows + OTHER_LINES)
    container.set_class(beside, "beside")
    container.set_class(below, "below")
    container.set_class(below and low, "low")
    if below:
        table.styles.height = rows if low else min(rows, screen.height * 2 // 5)
    else:
        table.styles.clear_rule("height")
