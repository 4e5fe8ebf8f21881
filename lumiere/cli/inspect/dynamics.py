"""`lumiere inspect dynamics`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.cli.console import escape, show_note, sparkline, stdout
from lumiere.cli.inspect.command import Analysis, analysis, show_wrapped
from lumiere.cli.inspect.inputs import InspectTarget
from lumiere.errors import LumiereError, check_choice

if TYPE_CHECKING:
    import numpy as np

    from lumiere.interpret.dynamics import Dynamics, Texts
    from lumiere.models.transformer import Transformer

NUM_BATCHES, BATCH_SIZE = 8, 32
"""Validation windows for the loss."""
LENS_WINDOWS = 8
MAX_TOKENS = 2**15
"""Validation tokens for the in-context-learning score and natural repeats of each snapshot."""
PLACE_WIDTH, MAX_COLUMNS = 18, 24
MARK = "bold yellow"

Metrics = Annotated[
    list[str] | None, Option("--metric", "-m", metavar="NAME", help="Metric to follow, of docs/inspect.md. Repeatable.")
]
Every = Annotated[int, Option(metavar="N", min=1, help="Read every N-th snapshot, and the last.")]
Lines = Annotated[int, Option(metavar="K", min=1, help="Heads, pairs or matrices shown of each metric.")]


@analysis(text=True, whole_run=True)
def dynamics(target: InspectTarget, metric: Metrics = None, every: Every = 1, top_k: Lines = 3) -> "Analysis[Dynamics]":
    """How did the model develop? Metrics of the other analyses along the snapshots of a run, and phase changes.

    Head scores are measured as by `heads`: on repeated random tokens, or on the text of --prompt, --file or --val. The
    terminal shows the heads, pairs of heads and matrices that changed most; -o FILE has all.
    """
    from lumiere.cli.progress import SnapshotProgress
    from lumiere.interpret.dynamics import DEFAULT_METRICS, METRICS, follow
    from lumiere.persistence.checkpoint_manager import snapshot_steps
    from lumiere.persistence.metrics import read_history
    from lumiere.report.figures.dynamics import draw_dynamics

    for name in metric or ():
        check_choice("metric", name, METRICS)
    names = list(dict.fromkeys(metric or DEFAULT_METRICS))
    run = target.opened.run
    snapshots = snapshot_steps(run)
    steps = sorted({*snapshots[::every], snapshots[-1]})
    texts, names, source = choose_texts(target, names, is_asked=metric is not None)
    if "copying" in names:
        texts = replace(texts, averaged=target.occurring_tokens)
        source += f"; copying over {target.averaged_over}"
    curve = [(point.step, point.loss) for point in read_history(run.metrics_path).training]

    def compute(model: "Transformer") -> "Dynamics":
        with SnapshotProgress(len(steps)) as progress:
            return follow(steps, lambda step: load_snapshot(target, step, model), names, texts, curve, progress)

    return Analysis(
        compute=compute,
        show=lambda result: show_dynamics(result, top_k),
        draw=draw_dynamics,
        source=f"{len(steps)} snapshots, steps {steps[0]:,} to {steps[-1]:,}" + (f"; {source}" if source else ""),
    )


def load_snapshot(target: InspectTarget, step: int, like: "Transformer") -> "Transformer":
    """Load the model at a step, in the type and on the device of another one."""
    from lumiere.persistence.checkpoint_manager import CheckpointManager
    from lumiere.persistence.loading import load_weights

    opened, weight = target.opened, like.token_embedding.weight
    loaded = CheckpointManager(opened.run.path.parent).load(opened.run, str(step), groups=("model",))
    model = load_weights(opened.config, loaded, f"the snapshot of step {step} of run {opened.run.id}")
    return model.to(device=weight.device, dtype=weight.dtype)


def choose_texts(target: InspectTarget, names: list[str], *, is_asked: bool) -> "tuple[Texts, list[str], str]":
    """Return the inputs of all snapshots, the metrics that can be computed from them, and their source.

    Without the corpus, refuse metrics that were asked for by name, and omit others with a note.
    """
    import torch

    from lumiere.interpret.dynamics import METRICS, Texts

    if target.given or any(METRICS[name].needs_tokens for name in names):
        tokens, source = target.scored_sequences()
        sources = [source or f"head scores on the {target.chosen[1]}"]
    else:
        tokens, sources = torch.tensor([[0]]), []
    with_corpus = [name for name in names if METRICS[name].needs_corpus]
    if not with_corpus:
        return Texts(tokens), names, "".join(sources)
    try:
        windows = target.spread_windows(MAX_TOKENS)
        batches, source = target.drawn_batches(NUM_BATCHES, BATCH_SIZE)
        # Only the lens needs full windows, and a split may have none.
        lens_rows = target.full_windows(LENS_WINDOWS)[:, :-1].tolist() if "lens-depth" in names else []
    except LumiereError as error:
        if is_asked:
            raise
        show_note(f"without {', '.join(with_corpus)}: {error.message}")
        return Texts(tokens), [name for name in names if name not in with_corpus], "".join(sources)
    return Texts(tokens, windows, batches, lens_rows), names, "; ".join([*sources, source])


def show_dynamics(result: "Dynamics", top_k: int) -> None:
    """Print a sparkline of each series, its first and last value, and its phase change.

    Of each metric, the series that changed most are printed, on one scale.
    """
    import numpy as np

    from lumiere.report.figures.dynamics import claims

    count = len(result.steps)
    columns = np.unique(np.linspace(0, count - 1, min(count, MAX_COLUMNS)).round().astype(int))
    stdout().print(f"[dim]{'':{PLACE_WIDTH + 3}}{ruler(result.steps[columns].tolist())}[/]")
    for metric in dict.fromkeys(result.metrics):
        found = result.series_of(metric)
        show_metric(result, metric, found[:top_k], len(found), columns)
    show_wrapped(f"[dim]{claims(result)}[/]\n")


def ruler(steps: Sequence[int]) -> str:
    """Return the steps above their columns, as many as have room."""
    text = ""
    for column, step in enumerate(steps):
        if not text or len(text) < column - 1:
            text = text.ljust(column) + f"{step:,}"
    return text


def show_metric(result: "Dynamics", name: str, series: Sequence[int], count: int, columns: "np.ndarray") -> None:
    import numpy as np

    from lumiere.interpret.dynamics import METRICS

    metric = METRICS[name]
    baseline = result.baselines[series[0]] if series else np.nan
    chance = f"at chance {baseline:.2f}" if np.isfinite(baseline) else ""
    unit = ", ".join(part for part in ("" if metric.unit == "share" else metric.unit, chance) if part)
    show_wrapped(f"[bold]{name}[/]: {escape(metric.meaning)}" + (f" ({escape(unit)})" if unit else ""))
    values = result.values[series]
    finite = values[np.isfinite(values)]
    if not len(finite):
        stdout().print("  none: this model has no such value\n")
        return
    for number in series:
        row, start, end = result.values[number], int(result.phase_starts[number]), int(result.phase_ends[number])
        curve = sparkline(row[columns].tolist(), float(finite.min()), float(finite.max()))
        padding = " " * (MAX_COLUMNS - len(curve))
        inside = np.flatnonzero((start >= 0) & (result.steps[columns] >= start) & (result.steps[columns] <= end))
        if len(inside):
            first, last = inside[0], inside[-1] + 1
            curve = f"{curve[:first]}[{MARK}]{curve[first:last]}[/]{curve[last:]}"
        ends = row[np.isfinite(row)][[0, -1]] if np.isfinite(row).any() else [np.nan, np.nan]
        line = f"  {escape(result.places[number]):{PLACE_WIDTH}} {curve}{padding}  {ends[0]:>7.2f} {ends[1]:>7.2f}"
        stdout().print(f"{line}  [{MARK}]{start:,}-{end:,}[/]" if start >= 0 else line)
    if count > len(series):
        stdout().print(f"  [dim]and {count - len(series)} that changed less[/]")
    stdout().print()
