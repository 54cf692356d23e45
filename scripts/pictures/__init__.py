"""Pictures of the app in a real terminal: a contact sheet, and the animation of the README.

The app runs in tmux, which keeps what it was sent with its colours. Needs tmux, and rsvg-convert
(librsvg2-bin) for PNG files.
"""
