"""Progress of training and tokenizing: a bar on a terminal, lines in a file."""

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

from lumiere.cli.console import duration, escape, show_note, show_warning, stderr
from lumiere.cli.display import Display
from lumiere.data.dataset import Progress as DataProgress
from lumiere.training.events import CheckpointEvent, EvaluationEvent, Event, StartEvent, StepEvent, WarningEvent


class TrainingProgress(Display):
    """Callback for the events of training."""

    def __init__(self) -> None:
        super().__init__(
            BarColumn(bar_width=8),  # the line must fit into 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._task = self.add_task("training", total=None, figures="")
        self._total_steps = 0

    def __call__(self, event: Event) -> None:
        match event:
            case StartEvent(step=step, total_steps=total):
                self._total_steps = total
                self.update(self._task, total=total, completed=step)
                stderr().print(f"[bold]{event.run_name}[/]")
                stderr().print(
                    f"{event.num_parameters:,} parameters, {event.num_windows:,} training windows, {total:,} steps "
                    f"({total / event.steps_per_epoch:,.1f} epochs), {event.precision} on {event.device} "
                    f"(peak {event.peak_flops / 1e9:,.0f} GFLOP/s)"
                )
                if event.frozen:
                    stderr().print(f"frozen: {escape(event.frozen)}")
                if step:
                    stderr().print(f"resuming from step {step:,}")
            case StepEvent(step=step):
                speed = f"{event.tokens_per_second:,.0f} tok/s  {event.mfu:.0%} mfu"
                figures = f"loss {event.loss:.3f}  lr {event.learning_rate:.1e}  {speed}"
                self.update(self._task, completed=step, figures=figures)
                left = event.seconds / step * (self._total_steps - step)
                self.print_line(lambda: f"step {step:,}/{self._total_steps:,}  {figures}  {duration(left)} left")
            case EvaluationEvent(evaluation=found):
                best = "  [green]best[/]" if event.is_best else ""
                stderr().print(
                    f"step {event.step:>7,}  epoch {event.epoch:6.2f}  validation loss {found.loss:.4f}  "
                    f"perplexity {found.perplexity:,.2f}  {duration(event.seconds)}{best}"
                )
            case WarningEvent(message=message):
                show_warning(message)
            case CheckpointEvent():
                pass


class CorpusProgress(Display):
    """Callback for `tokenize_corpus`: silent while the cache is read, a bar or lines once there is work."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[figures]}"))
        super().__init__(*columns)
        self._stages: dict[str, TaskID] = {}

    def __call__(self, progress: DataProgress) -> None:
        if progress.is_note:
            show_note(progress.stage)
            return
        if progress.stage not in self._stages:
            self._stages[progress.stage] = self.add_task(progress.stage, total=progress.total, figures="")
        documents = f"{progress.done:,} of {progress.total:,} documents" if progress.total else ""
        figures = documents or (f"{progress.num_bytes / 1e6:,.0f} MB" if progress.num_bytes else "")
        self.print_line(lambda: f"{progress.stage}  {figures}")
        self.update(self._stages[progress.stage], completed=progress.done, total=progress.total, figures=figures)


class SnapshotProgress(Display):
    """Show how many snapshots are done."""

    UNIT = "snapshots"

    def __init__(self) -> None:
        super().__init__(TextColumn(self.UNIT), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
        self._task = self.add_task(self.UNIT, total=None)

    def __call__(self, done: int, total: int) -> None:
        self.update(self._task, completed=done, total=total)


class ShardProgress(SnapshotProgress):
    """Show how many files are written."""

    UNIT = "files"
