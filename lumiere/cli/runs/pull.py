"""`lumiere runs pull`."""

import sys
from dataclasses import asdict
from typing import Annotated

from typer import Argument

from lumiere.cli.console import print_json, size
from lumiere.cli.options import Json, RunsDir
from lumiere.cli.runs.transfers import CheckpointNames, show_progress
from lumiere.persistence.runs import RunStore


def pull_run(
    url: Annotated[str, Argument(metavar="URL", help="Where runs were pushed to, or the folder of one of them.")],
    run: Annotated[
        str | None,
        Argument(metavar="RUN", help="Run name, id, unique start of an id, or latest. Default: the only one."),
    ] = None,
    checkpoints: CheckpointNames = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Copy a run from where it was pushed to into the runs directory.

    The run appears once all its files have arrived and match their hashes. Repeating an interrupted pull continues it.

    Example: [bold]lumiere runs pull s3://bucket/runs hiq6ihsb[/]
    """
    from lumiere.persistence.transfer import pull

    store = RunStore(runs_dir)
    with show_progress("interrupted; run the command again to continue") as report:
        done = pull(store, url, run, checkpoints or (), report)
    if as_json:
        print_json(asdict(done))
    elif not done.moved_files:
        sys.stdout.write(f"{done.run} is in {store.runs_dir}/ already, with the same {done.num_files:,} files\n")
    else:
        sys.stdout.write(
            f"pulled {done.run} into {store.runs_dir}/: {done.num_files:,} files, {size(done.num_bytes)}\n"
        )
