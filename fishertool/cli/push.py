"""`fishertool push`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fishertool.cli.app import app
from fishertool.cli.flags import Config, Json, Quiet, ReportFile, option, out_place
from fishertool.cli.printing import finish, telling_if_stopped


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="Folder that a verb wrote.", callback=out_place)],
    repo: Annotated[str, typer.Argument(help="Where to: org/name on the Hub; made if missing.")],
    config: Config = None,
    private: Annotated[
        bool, option("--private", help="Make the repository private; refuse a public one.")
    ] = False,
    revision: Annotated[
        str | None,
        option("--revision", help="Branch to commit to, made if missing [default: main]."),
    ] = None,
    pull_request: Annotated[
        bool | None,
        option(
            "--pull-request/--no-pull-request",
            help="Open a pull request, or commit [default: a pull request where main has files].",
        ),
    ] = None,
    message: Annotated[
        str | None, option("--message", help="Of the commit [default: names the verb].")
    ] = None,
    card: Annotated[
        Path | None,
        option("--card", help="Model card to send [default: the folder's README.md, or made]."),
    ] = None,
    no_card: Annotated[bool, option("--no-card", help="Send no README.md.")] = False,
    dry_run: Annotated[
        bool, option("--dry-run", help="Check, and show files and card; no network.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    report_file: ReportFile = None,
) -> None:
    """Publish an output on the Hugging Face Hub, if it still is as its report says.

    The token is the one of `hf auth login`, or HF_TOKEN.

    Example: fishertool push merged org/merged --private
    """
    from fishertool.commands.push import push as command
    from fishertool.paths import expanded

    told = None if dry_run else "the Hub has all of it in one commit, or none"
    with telling_if_stopped(told):
        report = command(
            out,
            repo,
            private=private,
            revision=revision,
            pull_request=pull_request,
            message=message,
            card=None if card is None else expanded(card),
            make_card=not no_card,
            dry_run=dry_run,
            bars=not quiet and sys.stderr.isatty(),
        )
    finish(report, as_json, quiet, report_file)
