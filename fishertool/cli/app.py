"""The Typer app, on which each verb's file puts its own."""

from typing import Annotated

import typer

from fishertool import __version__
from fishertool.launcher import check_alone

app = typer.Typer(
    help="Fisher-guided surgery on Hugging Face checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SHARED = "estimate-fisher"
"""The verb whose work several processes share."""


def _show_version(show: bool) -> None:
    if show:
        print(f"fishertool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Fisher-guided surgery on Hugging Face checkpoints."""
    if context.invoked_subcommand not in (None, SHARED):
        check_alone(context.invoked_subcommand)
