"""What a person reads on the app's screen."""


def notices(app):
    """The notices in sight, oldest first."""
    return [str(toast.render()) for toast in app.screen.query("Toast")]


def cells(table, index):
    """A table row's cells, as in a terminal in which all columns have room."""
    return [text.strip() for text, _ in table.row(index, 200)[1::2]]
