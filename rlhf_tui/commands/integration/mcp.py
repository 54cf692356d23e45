"""The command that serves sessions to an assistant: mcp."""

from pathlib import Path

import click

from engine.errors import UserInputError
from rlhf_tui.commands.options import folder_is_given, sessions_option

PACKAGES = ("mcp", "mcp_types")


@click.command()
@sessions_option
@click.option(
    "--allow-steering",
    is_flag=True,
    help="Also offer tools that steer: pause, set, stop and so on.",
)
def mcp(root: Path, allow_steering: bool) -> None:
    """Serve sessions to an assistant over MCP.

    Speaks the Model Context Protocol on standard input and output. An assistant's program starts
    this command, which ends when its input ends.
    """
    try:
        from rlhf_tui.commands.integration.mcp_server import make_server  # noqa: PLC0415 - an extra
    except ImportError as error:  # not installed, or another version
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        raise UserInputError(
            "rlhf-tui mcp needs the package mcp, version 2 or newer: pip install 'rlhf-tui[mcp]'"
        ) from error
    only_root = folder_is_given()
    make_server(root.resolve(), only_root=only_root, steering=allow_steering).run("stdio")
