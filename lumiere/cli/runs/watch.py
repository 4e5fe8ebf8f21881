"""`lumiere runs watch`."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lumiere.cli.console import STATUS_STYLES, duration, number, print_json, stdout
from lumiere.cli.options import Json, RunReference, RunsDir
from lumiere.errors import LumiereError, printable
from lumiere.persistence.metrics import Downsampler, History, MetricsFollower, Point, as_number, point_of
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import Run, RunStore

if TYPE_CHECKING:
    from rich.console import RenderableType

SECONDS_BETWEEN_LOOKS = 1.0
MOST_UNKNOWN_LOOKS = 5
"""A run that was just created has no status yet."""
MAX_POINTS = 500
CHART_HEIGHT = 12


def watch_run(run: RunReference, runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """Follow a training run from another terminal until it ends. Ctrl-C stops watching, not training.

    Without a terminal, print the newest metrics, then each new line; with [bold]--json[/] the lines of metrics.jsonl,
    and at the end the run's status.

    Example: [bold]lumiere runs watch latest[/]
    """
    watched = Watched(RunStore(runs_dir).open(run))
    if as_json or not sys.stdout.isatty():
        watch_as_lines(watched, as_json)
        return
    from rich.live import Live

    # Not redirected: Rich's replacement of stdout is not a terminal.
    with Live(console=stdout(), auto_refresh=False, redirect_stdout=False) as live:
        for _ in watched.looks():
            live.update(view(watched), refresh=True)


class Watched:
    """The state of a run, read from its files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.status = "unknown"
        self.record = RunRecord()
        self._follower = MetricsFollower(run.metrics_path)
        self._restarts = 0
        self._clear()

    def _clear(self) -> None:
        self.training: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self._curves: dict[str, Downsampler[Point]] = {key: Downsampler(MAX_POINTS) for key in ("loss", "val_loss")}

    def looks(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the last training and evaluation, then the new metrics now and then, until the run is over."""
        self.look()
        yield sorted(filter(None, (self.training, self.evaluation)), key=lambda line: line["step"])
        unknown_looks = int(self.status == "unknown")
        while self.status == "running" or (self.status == "unknown" and unknown_looks < MOST_UNKNOWN_LOOKS):
            sys.stdout.flush()
            time.sleep(SECONDS_BETWEEN_LOOKS)
            yield self.look()
            unknown_looks += self.status == "unknown"

    def look(self) -> list[dict[str, Any]]:
        """Return the metrics since the last look."""
        # Read the status first: metrics written before it changed are then found by the same look.
        self.status, self.record = self.run.status, self.run.record
        if not self.run.path.is_dir():
            raise LumiereError(f"run {self.run.id} is gone", "lumiere runs ls lists the runs")
        lines = []
        for record in self._follower.poll():
            if self._follower.restarts != self._restarts:
                self._restarts = self._follower.restarts
                self._clear()
            if "val_loss" in record:
                key, self.evaluation = "val_loss", record
            else:
                key, self.training = "loss", record
            if point := point_of(record, key):
                self._curves[key].add(point)
            lines.append(record)
        return lines

    @property
    def history(self) -> History:
        return History(*(tuple(curve.items()) for curve in self._curves.values()))

    @property
    def step(self) -> int | float | None:
        """Step of the newest metrics."""
        return as_number(max(self.training, self.evaluation, key=lambda line: line.get("step", -1)).get("step"))

    def of_total(self, step: Any) -> str:
        """Format a step, and the total if it is known."""
        total = number(self.record.total_steps, ",")
        return f"step {number(step, ',')}" + ("" if total == "-" else f"/{total}")

    @property
    def time_left(self) -> str:
        """Estimate from the mean speed so far, without evaluating and saving; empty if unknown."""
        total, step = self.record.total_steps, self.step
        seconds = as_number((self.training or self.evaluation).get("time"))
        if self.status != "running" or total is None or not step or seconds is None:
            return ""
        return f"  {duration(max(0.0, seconds / step * (total - step)))} left"


def watch_as_lines(watched: Watched, as_json: bool) -> None:
    for records in watched.looks():
        for record in records:
            if as_json:
                print_json(record, indent=None)
            else:
                sys.stdout.write(describe(record, watched) + "\n")
    if as_json:
        print_json({"run": watched.run.name, "status": watched.status}, indent=None)
    else:
        sys.stdout.write(f"{watched.run.name} is {printable(watched.status)}\n")


def describe(record: dict[str, Any], watched: Watched) -> str:
    """Format a line of metrics."""
    step = watched.of_total(record["step"])
    if "val_loss" in record:
        perplexity = number(record.get("val_perplexity"), ",.2f")
        return f"{step}  validation loss {number(record['val_loss'], '.4f')}  perplexity {perplexity}"
    speed = number(record.get("tokens_per_second"), ",.0f")
    return f"{step}  loss {number(record.get('loss'), '.3f')}  {speed} tok/s{watched.time_left}"


def view(watched: Watched) -> "RenderableType":
    """Render the newest metrics in one line, and the curves."""
    from rich.console import Group
    from rich.text import Text

    from lumiere.cli.runs.plot import draw, legend

    title = Text(watched.run.name, style="bold").append("  ")
    title.append(printable(watched.status), style=STATUS_STYLES.get(watched.status, "dim"))
    training, evaluation, record = watched.training, watched.evaluation, watched.record
    figures = [watched.of_total(watched.step)]
    if training:
        speed = number(training.get("tokens_per_second"), ",.0f")
        figures += [f"loss {number(training.get('loss'), '.3f')}", f"{speed} tok/s"]
    if evaluation:
        figures.append(f"validation {number(evaluation.get('val_loss'), '.4f')}")
    if record.best_loss is not None:
        figures.append(f"best {number(record.best_loss, '.4f')}")
    parts: list[RenderableType] = [title, Text("  ".join(figures) + watched.time_left)]
    history = watched.history
    if history.training or history.validation:
        lines = [*draw([history], "step", CHART_HEIGHT), *legend(["nats per token"])]
        parts.extend(Text.from_ansi(line, no_wrap=True) for line in lines)
    return Group(*parts)
