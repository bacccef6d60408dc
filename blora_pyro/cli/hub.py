"""`blora-pyro push-to-hub`."""

from pathlib import Path
from typing import Annotated

import typer

from blora_pyro.cli.common import Overwrite, one_line_errors
from blora_pyro.errors import UserError


def push_to_hub(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a fit.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME; made if it is not there.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make it a private repository.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Branch to write to.", show_default="the main one"),
    ] = None,
    commit_message: Annotated[
        str | None, typer.Option(help="Of the commit.", show_default="a plain one")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="The base's id on the Hub, if the fit had it in a local folder.",
            show_default="the fit's",
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Of the adapter, for its card: apache-2.0, ...", show_default="none"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write to what would be uploaded; nothing is uploaded then."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Upload a run to the Hugging Face Hub: PEFT adapter, posterior and model card.

    The token is that of `hf auth login`, or HF_TOKEN. Of local paths only the last part goes up.
    """
    with one_line_errors():
        from blora_pyro.publishing.uploads import push_run, write_public_run
        from blora_pyro.runs.folders import claim

        card = {"revision": revision, "base": base, "license": license}
        if output is not None:
            if output.resolve() == run.resolve():
                raise UserError(f"output is {output}, the run's own folder; give another")
            write_public_run(run, claim(output, overwrite), repo_id, **card)
            typer.echo(f"not uploaded, but written to: {output}")
            return
        url = push_run(
            run,
            repo_id,
            private=private or None,
            commit_message=commit_message,
            create_pr=create_pr,
            **card,
        )
        typer.echo(f"pushed: {url}")
