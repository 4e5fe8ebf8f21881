"""`lumiere runs card`: the model card of a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.cli.console import show_note
from lumiere.cli.options import Device, RunReference, RunsDir, open_model
from lumiere.errors import LumiereError, printable
from lumiere.persistence.loading import open_corpus
from lumiere.persistence.runs import Run, RunStore
from lumiere.report.figures.figure import check_output, write_output

if TYPE_CHECKING:
    from lumiere.evaluation.loss import Evaluation


def show_card(
    run: RunReference,
    output: Annotated[
        str | None, Option("--output", "-o", metavar="FILE", help="Write the card to FILE, for example README.md.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace the file if it exists.")] = False,
    device: Device = "auto",
    runs_dir: RunsDir = None,
) -> None:
    """Print or write the model card of a run: Markdown with a Hugging Face Hub header.

    Example: [bold]lumiere runs card latest -o README.md[/]
    """
    opened = RunStore(runs_dir).open(run)
    if opened.record.status == "imported":
        raise LumiereError(
            f"run {opened.id} was imported; a model card describes how a model was trained",
            f"its own card, if it has one, is at its source: {printable(str(opened.record.source.get('path')))}",
        )
    path = None if output is None else Path(output)
    if path is not None:
        check_output(path)
        if path.exists() and not force:
            raise LumiereError(f"{path} exists", "replace it with --force, or name another file")
    from lumiere.report.model_card import card_checkpoint, gather, kept_evaluation, model_card

    checkpoint, step = card_checkpoint(opened)
    evaluation = kept_evaluation(opened.record, step) or evaluate_now(opened, checkpoint, device, runs_dir)
    card = model_card(gather(opened, checkpoint, step, evaluation))
    if path is None:
        sys.stdout.write(card)
        return
    write_output(path, card.encode())
    show_note(f"wrote {path}")


def evaluate_now(run: Run, checkpoint: str, device: str, runs_dir: str | None) -> "Evaluation":
    """Evaluate as training would have, for a run without a recorded evaluation."""
    from lumiere.evaluation.loss import evaluate

    show_note(f"run {run.id} has no evaluation of checkpoint {checkpoint}; evaluating it now")
    opened = open_model(run.name, checkpoint, device, runs_dir)
    corpus = open_corpus(opened, "restore it: the card needs its losses")
    windows = corpus.windows("validation", opened.config)
    facts = corpus.splits["validation"].facts
    return evaluate(opened.model, windows, facts, opened.config.training.batch_size)
