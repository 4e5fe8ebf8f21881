"""`lumiere runs watch`."""

import sys
import time
from typing import TYPE_CHECKING, Any

from lumiere.cli.console import STATUS_STYLES, duration, number, print_json
from lumiere.cli.options import Json, RunReference, RunsDir
from lumiere.errors import LumiereError, printable
from lumiere.persistence.metrics import History, MetricsFollower, Point, Thinned, as_number, point_of
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
    else:
        watch_live(watched)


class Watched:
    """The state of a run, read from its files."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.status = "unknown"
        self.record = RunRecord()
        self._follower = MetricsFollower(run.metrics_path)
        self._unknown_looks = 0
        self._is_first = True
        self._clear()

    def _clear(self) -> None:
        self._training: Thinned[Point] = Thinned(MAX_POINTS)
        self._validation: Thinned[Point] = Thinned(MAX_POINTS)
        self.last_training: dict[str, Any] = {}
        self.last_evaluation: dict[str, Any] = {}

    def look(self) -> list[dict[str, Any]]:
        """Return the metrics since the last look; the first look returns the last training and evaluation."""
        # Read the status first: metrics written before it changed are then found by the same look.
        self.status, self.record = self.run.status, self.run.record
        if not self.run.path.is_dir():
            raise LumiereError(f"run {self.run.id} is gone", "lumiere runs ls lists the runs")
        self._unknown_looks += self.status == "unknown"
        is_first, restarts = self._is_first, self._follower.restarts
        self._is_first = False
        lines = []
        for record in self._follower.poll():
            if self._follower.restarts != restarts:
                restarts = self._follower.restarts
                self._clear()
            self._add(record)
            if not is_first:
                lines.append(record)
        if is_first:
            found = (line for line in (self.last_training, self.last_evaluation) if line)
            return sorted(found, key=lambda line: line["step"])
        return lines

    @property
    def is_over(self) -> bool:
        is_new = self.status == "unknown" and self._unknown_looks < MOST_UNKNOWN_LOOKS
        return self.status != "running" and not is_new

    @property
    def history(self) -> History:
        return History(tuple(self._training.items()), tuple(self._validation.items()))

    @property
    def step(self) -> int | float | None:
        """Step of the newest metrics."""
        lines = (self.last_training, self.last_evaluation)
        return as_number(max(lines, key=lambda line: line.get("step", -1)).get("step"))

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the mean speed so far, without evaluating and saving."""
        total, step = self.record.total_steps, self.step
        seconds = as_number((self.last_training or self.last_evaluation).get("time"))
        if total is None or not step or seconds is None:
            return None
        return max(0.0, seconds / step * (total - step))

    def _add(self, record: dict[str, Any]) -> None:
        if "val_loss" in record:
            self.last_evaluation = record
            if point := point_of(record, "val_loss"):
                self._validation.add(point)
        else:
            self.last_training = record
            if point := point_of(record, "loss"):
                self._training.add(point)


def watch_as_lines(watched: Watched, as_json: bool) -> None:
    while True:
        for record in watched.look():
            if as_json:
                print_json(record, indent=None)
            else:
                sys.stdout.write(describe(record, watched) + "\n")
        if watched.is_over:
            break
        sys.stdout.flush()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if as_json:
        print_json({"run": watched.run.name, "status": watched.status}, indent=None)
    else:
        sys.stdout.write(f"{watched.run.name} is {printable(watched.status)}\n")


def watch_live(watched: Watched) -> None:
    from rich.live import Live

    from lumiere.cli.console import stdout

    # Not redirected: Rich's replacement of stdout is not a terminal.
    with Live(console=stdout(), auto_refresh=False, redirect_stdout=False) as live:
        while True:
            watched.look()
            live.update(view(watched), refresh=True)
            if watched.is_over:
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def view(watched: Watched) -> "RenderableType":
    """Render the current state."""
    from rich.console import Group
    from rich.text import Text

    from lumiere.cli.runs.plot import draw, legend, terminal_width

    title = Text(watched.run.name, style="bold").append("  ")
    title.append(printable(watched.status), style=STATUS_STYLES.get(watched.status, "dim"))
    parts: list[RenderableType] = [title, Text(figures(watched))]
    history = watched.history
    if history.training or history.validation:
        lines = [*draw([history], "step", terminal_width(), CHART_HEIGHT), *legend(["nats per token"])]
        parts.extend(Text.from_ansi(line, no_wrap=True) for line in lines)
    return Group(*parts)


def figures(watched: Watched) -> str:
    """Format the newest metrics in one line."""
    training, evaluation, record = watched.last_training, watched.last_evaluation, watched.record
    parts = [f"step {number(watched.step, ',')}{of_total(record)}"]
    if training:
        parts += [
            f"loss {number(training.get('loss'), '.3f')}",
            f"{number(training.get('tokens_per_second'), ',.0f')} tok/s",
        ]
    if evaluation:
        parts.append(f"validation {number(evaluation.get('val_loss'), '.4f')}")
    if record.best_loss is not None:
        parts.append(f"best {number(record.best_loss, '.4f')}")
    return "  ".join(parts) + time_left(watched)


def describe(record: dict[str, Any], watched: Watched) -> str:
    """Format a line of metrics."""
    step = f"step {number(record['step'], ',')}{of_total(watched.record)}"
    if "val_loss" in record:
        perplexity = number(record.get("val_perplexity"), ",.2f")
        return f"{step}  validation loss {number(record['val_loss'], '.4f')}  perplexity {perplexity}"
    speed = number(record.get("tokens_per_second"), ",.0f")
    return f"{step}  loss {number(record.get('loss'), '.3f')}  {speed} tok/s{time_left(watched)}"


def of_total(record: RunRecord) -> str:
    total = number(record.total_steps, ",")
    return "" if total == "-" else f"/{total}"


def time_left(watched: Watched) -> str:
    if watched.status != "running" or watched.seconds_left is None:
        return ""
    return f"  {duration(watched.seconds_left)} left"
