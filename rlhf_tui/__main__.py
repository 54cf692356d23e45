"""The program ``rlhf-tui``: the command line, imported where Ctrl-C ends it in one line.

To import it takes a third of a second, in which Python would print a traceback.
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
