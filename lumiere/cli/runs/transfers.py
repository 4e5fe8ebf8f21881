"""What `lumiere runs push` and `pull` share: the option for checkpoints, and progress on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.cli.console import show_note, size

if TYPE_CHECKING:
    from lumiere.persistence.transfer import Progress

CheckpointNames = Annotated[
    list[str] | None,
    Option(
        "--checkpoint",
        "-c",
        metavar="NAME",
        help="Copy this checkpoint: best, latest, previous, a step, or snapshots for all of these. Repeatable. "
        "Default: all checkpoints.",
    ),
]


@contextmanager
def show_progress(after_interrupt: str) -> Iterator[Callable[["Progress"], None]]:
    """Yield a callback that shows how far a transfer is; print a note if Ctrl-C ends it."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from lumiere.cli.display import Display

    columns = TextColumn("{task.description}"), BarColumn(bar_width=16), DownloadColumn(), TransferSpeedColumn()
    display = Display(*columns, TimeRemainingColumn())
    tasks = {}

    def report(progress: "Progress") -> None:
        if progress.stage not in tasks:
            for task in tasks.values():
                display.remove_task(task)
            tasks.clear()
            tasks[progress.stage] = display.add_task(progress.stage, total=progress.total)
        display.update(tasks[progress.stage], completed=progress.done)
        display.print_line(lambda: f"{progress.stage}  {size(progress.done)} of {size(progress.total)}")

    try:
        with display:
            yield report
    except KeyboardInterrupt:
        show_note(after_interrupt)
        raise
