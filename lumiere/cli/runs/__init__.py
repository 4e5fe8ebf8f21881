"""`lumiere runs`: the runs directory, one file a command."""

import typer

from lumiere.cli.console import guarded
from lumiere.cli.runs.card import show_card
from lumiere.cli.runs.compare import compare_runs
from lumiere.cli.runs.edit import note_run, prune_runs, remove_runs, tag_run
from lumiere.cli.runs.ls import list_all
from lumiere.cli.runs.plot import plot_runs
from lumiere.cli.runs.show import show_run
from lumiere.cli.runs.watch import watch_run
from lumiere.cli.usage import Commands

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="List, describe, compare, plot, watch, label and delete runs."
)
app.command("ls")(guarded(list_all))
app.command("show")(guarded(show_run))
app.command("card")(guarded(show_card))
app.command("compare")(guarded(compare_runs))
app.command("plot")(guarded(plot_runs))
app.command("watch")(guarded(watch_run))
app.command("tag")(guarded(tag_run))
app.command("note")(guarded(note_run))
app.command("rm")(guarded(remove_runs))
app.command("prune")(guarded(prune_runs))
