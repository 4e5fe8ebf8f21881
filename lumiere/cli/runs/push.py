"""`lumiere runs push`."""

import sys
from dataclasses import asdict
from typing import Annotated

from typer import Argument

from lumiere.cli.console import print_json, size
from lumiere.cli.options import Json, RunReference, RunsDir
from lumiere.cli.runs.transfers import CheckpointNames, show_progress
from lumiere.persistence.runs import RunStore


def push_run(
    run: RunReference,
    url: Annotated[str, Argument(metavar="URL", help="A folder, s3://bucket/path, hf://user/repo, ... for runs.")],
    checkpoints: CheckpointNames = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Copy a run to a folder, S3, the Hugging Face Hub, or any other place that fsspec reaches.

    Files that are already there are skipped, so repeating an interrupted push continues it. A run that is being
    trained is pushed at its last checkpoint.

    Example: [bold]lumiere runs push latest s3://bucket/runs --checkpoint best[/]
    """
    from lumiere.persistence.transfer import push

    with show_progress("interrupted; run the command again to continue") as report:
        done = push(RunStore(runs_dir).open(run), url, checkpoints or (), report)
    if as_json:
        print_json(asdict(done))
        return
    there = done.num_files - done.moved_files
    skipped = f" ({there:,} of them were there)" if there else ""
    sys.stdout.write(
        f"pushed {done.run} to {done.address}: {done.num_files:,} files{skipped}, {size(done.moved_bytes)} sent\n"
    )
