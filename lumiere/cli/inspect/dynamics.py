"""`lumiere inspect dynamics`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lumiere.cli.console import show_note
from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.errors import LumiereError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lumiere.data.batches import Batch
    from lumiere.interpret.dynamics import Dynamics, Texts
    from lumiere.models.transformer import Transformer

BATCHES, BATCH_SIZE = 8, 32
"""Of validation windows, for the loss."""
LENS_WINDOWS = 8
MOST_TOKENS = 2**15
"""Of the validation split, for the in-context-learning score and natural repeats of each snapshot."""

Metrics = Annotated[
    Optional[list[str]],  # noqa: UP045 (Typer reads this form)
    typer.Option("--metric", "-m", metavar="NAME", help="What to follow; repeatable. docs/inspect.md has them all."),
]
Every = Annotated[int, typer.Option("--every", metavar="N", min=1, help="Take each N-th snapshot, and the last.")]
Lines = Annotated[int, typer.Option("--top-k", metavar="K", min=1, help="Heads, pairs or matrices to show of each.")]


@analysis(text=True, whole_run=True)
def dynamics(subject: Subject, metric: Metrics = None, every: Every = 1, top_k: Lines = 3) -> "Analysis[Dynamics]":
    """How did the model come about? Numbers of the other analyses along the snapshots of a run, and phase changes.

    Scores of heads are measured as by `heads`: on random tokens that come twice, or on the text of --prompt, --file
    or --val. Of heads, pairs of heads and matrices the terminal shows those that changed most; -o FILE has all.
    """
    from lumiere.cli.inspect.dynamics_view import show
    from lumiere.cli.inspect.texts import averaged_tokens
    from lumiere.cli.progress import SnapshotProgress
    from lumiere.interpret.dynamics import follow
    from lumiere.persistence.checkpoint_manager import snapshot_steps
    from lumiere.persistence.metrics import read_history
    from lumiere.report.figures.dynamics import CAPTION, draw_dynamics, dynamics_page
    from lumiere.report.figures.figure import Picture

    names = chosen_metrics(metric)
    run = subject.opened.run
    steps = thinned(snapshot_steps(run), every)
    texts, names, source = choose_texts(subject, names, is_asked=metric is not None)
    if "copying" in names:
        averaged, averaged_over = averaged_tokens(subject.opened)
        texts, source = replace(texts, averaged=averaged), f"{source}; copying over {averaged_over}"
    curve = [(point.step, point.loss) for point in read_history(run.metrics_path).training]

    def compute(model: "Transformer") -> "Dynamics":
        with SnapshotProgress(len(steps)) as progress:
            return follow(steps, lambda step: snapshot(subject, step, model), names, texts, curve, progress)

    return Analysis(
        compute=compute,
        show=lambda result: show(result, top_k),
        draw=lambda result: Picture(
            draw_dynamics(result),
            "Along the training",
            CAPTION,
            page=lambda title: dynamics_page(result, title),
        ),
        source=f"{len(steps)} snapshots, steps {steps[0]:,} to {steps[-1]:,}" + (f"; {source}" if source else ""),
    )


def chosen_metrics(names: Sequence[str] | None) -> list[str]:
    """The metrics of these names, each once; without any the default ones.

    Raises:
        LumiereError: there is none of that name.
    """
    from lumiere.interpret.dynamics import DEFAULT_METRICS, METRICS

    for name in names or ():
        if name not in METRICS:
            guess = nearest(name, METRICS)
            raise LumiereError(
                f"there is no metric {name!r}", f"did you mean {guess}?" if guess else f"one of {', '.join(METRICS)}"
            )
    return list(dict.fromkeys(names or DEFAULT_METRICS))


def thinned(steps: Sequence[int], every: int) -> list[int]:
    """Each `every`-th one, and the last."""
    return sorted({*steps[::every], steps[-1]})


def snapshot(subject: Subject, step: int, like: "Transformer") -> "Transformer":
    """The model at a step, in the type and on the device of another one."""
    from lumiere.persistence.checkpoint_manager import CheckpointManager
    from lumiere.persistence.loading import load_weights

    opened, weight = subject.opened, like.token_embedding.weight
    loaded = CheckpointManager(opened.run.path.parent).load(opened.run, str(step), groups=("model",))
    model = load_weights(opened.config, loaded, f"the snapshot of step {step} of run {opened.run.id}")
    return model.to(device=weight.device, dtype=weight.dtype)


def choose_texts(subject: Subject, names: list[str], *, is_asked: bool) -> "tuple[Texts, list[str], str]":
    """What the snapshots are given, the metrics that there is a text for, and words about it.

    Raises:
        LumiereError: as `choose_text`, or the corpus is not there, and a metric that needs it was asked for by name.
    """
    import torch

    from lumiere.cli.inspect.texts import repeated_sequences
    from lumiere.data.tokenizer import SOT
    from lumiere.interpret.dynamics import METRICS, Texts
    from lumiere.interpret.head_scores import SEQUENCES

    if any(value is not None for name, value in subject.text.items() if name != "random"):
        tokens, words = torch.tensor([subject.tokens]), [f"head scores on the {subject.chosen[1]}"]
    elif subject.text["random"] is None and not any(METRICS[name].needs_tokens for name in names):
        tokens, words = torch.tensor([[SOT]]), []
    else:
        sequences, origin = repeated_sequences(subject.opened, subject.text["random"], SEQUENCES, subject.seed)
        tokens = torch.tensor(sequences)
        length = tokens.shape[1] // 2
        words = [f"{SEQUENCES} sequences of {length} random tokens {origin}, twice (seed {subject.seed})"]
    with_corpus = [name for name in names if METRICS[name].needs_corpus]
    if not with_corpus:
        return Texts(tokens), names, "".join(words)
    try:
        windows, batches, lens_rows, about = validation_texts(subject, with_corpus)
    except LumiereError as error:
        if is_asked:
            raise
        show_note(f"without {', '.join(with_corpus)}: {error.message}")
        return Texts(tokens), [name for name in names if name not in with_corpus], "".join(words)
    return Texts(tokens, windows, batches, lens_rows), names, "; ".join([*words, about])


def validation_texts(
    subject: Subject, names: Sequence[str]
) -> "tuple[tuple[Tensor, np.ndarray], list[Batch], list[list[int]], str]":
    """Windows with their documents, batches for the loss, texts for the lens, and words about them."""
    from lumiere.cli.inspect.batches import validation_batches
    from lumiere.cli.inspect.texts import full_windows, spread_windows

    windows = spread_windows(subject.opened, MOST_TOKENS)
    batches, about = validation_batches(subject, BATCHES, BATCH_SIZE)
    # A split may have no window that is full, which only the lens needs.
    lens_rows = full_windows(subject.opened, LENS_WINDOWS)[:, :-1].tolist() if "lens-depth" in names else []
    return windows, batches, lens_rows, about
