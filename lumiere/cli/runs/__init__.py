"""`lumiere runs`: the runs directory, one file a command."""

import typer

from lumiere.cli.runs.card import show_card
from lumiere.cli.runs.compare import compare_runs
from lumiere.cli.runs.edit import note_run, prune_runs, remove_runs, tag_run
from lumiere.cli.runs.ls import list_all
from lumiere.cli.runs.plot import plot_runs
from lumiere.cli.runs.pull import pull_run
from lumiere.cli.runs.push import push_run
from lumiere.cli.runs.show import show_run
from lumiere.cli.runs.watch import watch_run
from lumiere.cli.usage import Commands

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="List, describe, compare, plot, watch, label, copy and delete runs."
)
app.command("ls")(list_all)
app.command("show")(show_run)
app.command("card")(show_card)
app.command("compare")(compare_runs)
app.command("plot")(plot_runs)
app.command("watch")(watch_run)
app.command("tag")(tag_run)
app.command("note")(note_run)
app.command("push")(push_run)
app.command("pull")(pull_run)
app.command("rm")(remove_runs)
app.command("prune")(prune_runs)
