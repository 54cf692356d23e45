"""The program ``rlhf-tui``: imports the command line so that Ctrl-C ends it without a traceback.

The import takes a third of a second.
"""

import sys


def main() -> None:
    """The entry point; see :func:`rlhf_tui.cli.main`."""
    try:
        from rlhf_tui.cli import main as command_line  # noqa: PLC0415 - see above

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("rlhf-tui: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
