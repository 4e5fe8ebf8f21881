"""`lumiere eval`."""

import sys
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.cli.console import print_json, show_note
from lumiere.cli.options import CheckpointName, Device, Json, MaxTokens, RunReferences, RunsDir, open_model
from lumiere.errors import LumiereError, printable
from lumiere.persistence.runs import RunStore

if TYPE_CHECKING:
    from lumiere.api.evaluation import Evaluated, Strings


def evaluate(
    runs: RunReferences,
    checkpoint: CheckpointName = "best",
    split: Annotated[str | None, Option(help="Score train, validation or test. \\[default: validation]")] = None,
    text: Annotated[
        str | None, Option(metavar="FILE", help="Score this UTF-8 text file instead of a split; - reads stdin.")
    ] = None,
    dataset: Annotated[
        str | None, Option(metavar="NAME", help="Score a dataset: stories, a Hub name or a folder.")
    ] = None,
    subset: Annotated[str | None, Option(metavar="NAME", help="Its subset, for example wikitext-2-raw-v1.")] = None,
    stride: Annotated[
        int | None,
        Option(
            metavar="N",
            help="Score each token once, in windows N tokens apart. A smaller N gives longer contexts, slower. "
            "\\[default: the windows of training, which score overlaps twice]",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    batch_size: Annotated[
        int | None,
        Option(
            min=1, help="Average over batches of this many windows, as the model card does. \\[default: as in training]"
        ),
    ] = None,
    baselines: Annotated[
        bool, Option("--baselines/--no-baselines", help="Compare with n-gram models of the training split.")
    ] = True,
    output: Annotated[
        str | None,
        Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Plot losses by position and frequency, and calibration: .png, .svg or .html (needs lumiere\\[plot]).",
        ),
    ] = None,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Score checkpoints: loss, perplexity, bits per byte, accuracy, calibration, and n-gram baselines.

    Several runs are compared document by document. Results are saved in the run's folder eval/.

    Example: [bold]lumiere eval latest --split test[/]
    """
    if output is not None:
        from lumiere.report.figures.figure import check_picture

        check_picture(Path(output))
    from lumiere.api.evaluation import draw, evaluate_one, text_reader

    read = text_reader({"--text": None if text is None else strings_of(text)}, dataset, subset, split)

    from lumiere.cli.scores import as_values, show
    from lumiere.device import keep_freed_memory

    keep_freed_memory()
    evaluated: list[Evaluated] = []
    for run in RunStore(runs_dir).open_all(runs):
        opened = open_model(run.name, checkpoint, device, runs_dir, max_tokens)
        scored = read(opened)
        for note in scored.notes:
            show_note(note)
        if evaluated and scored.split.facts.sha256 != evaluated[0].about["corpus_sha256"]:
            raise LumiereError(
                f"{scored.corpus} differs between run {opened.run.id} and run {evaluated[0].run.id}",
                "score both on the same text with --text FILE or --dataset NAME",
            )
        one = evaluate_one(opened, scored, stride, batch_size, baselines)
        if evaluated and (one.about["protocol"] == "last") != (evaluated[0].about["protocol"] == "last"):
            raise LumiereError(
                f"run {one.run.id} and run {evaluated[0].run.id} were trained with other training.loss_positions",
                "score all tokens of both with --stride N",
            )
        evaluated.append(one)
    for one in evaluated:
        keep(one)
    if output is not None:
        from lumiere.report.figures.figure import save_picture

        save_picture(Path(output), draw(evaluated))
        show_note(f"wrote {printable(output)}")
    if as_json:
        print_json(as_values(evaluated))
    else:
        show(evaluated)


def keep(one: "Evaluated") -> None:
    """Save an evaluation in its run's folder, or note why that failed."""
    try:
        path = one.keep()
    except LumiereError as error:
        show_note(f"not saved: {error.message}")
    else:
        show_note(f"saved as {path.relative_to(one.run.path.parent)}")


def strings_of(path: str) -> "Strings":
    """Return the name of a text and a function that reads it: a file, or stdin if the path is `-`."""
    from lumiere.data.text import blocks, decoded

    if path != "-":
        return path, partial(blocks, path)
    data = sys.stdin.buffer.read()
    return "stdin", lambda: decoded(BytesIO(data), "stdin")
