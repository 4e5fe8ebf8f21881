"""`lumiere eval`."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lumiere.cli.console import open_model, print_json, show_note
from lumiere.cli.options import CheckpointName, Device, Json, RunReferences, RunsDir
from lumiere.errors import DataError, LumiereError, nearest, printable
from lumiere.persistence.loading import OpenedModel, open_corpus

if TYPE_CHECKING:
    from lumiere.cli.scores import Evaluated
    from lumiere.config.schema import DatasetConfig
    from lumiere.data.dataset import Sizes, TokenizedSplit
    from lumiere.data.text import Part
    from lumiere.evaluation.detailed import DetailedEvaluation


def evaluate(
    runs: RunReferences,
    checkpoint: CheckpointName = "best",
    split: Annotated[
        str | None, typer.Option("--split", help="Score train, validation or test. \\[default: validation]")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="Score this UTF-8 text file instead of a split; - reads stdin."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="Score a dataset: stories, a Hub name or a folder."),
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option("--subset", metavar="NAME", help="Its subset, for example wikitext-2-raw-v1."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="N",
            help="Score each token once, in windows N tokens apart. A smaller N gives longer contexts, slower. "
            "\\[default: the windows of training, which score overlaps twice]",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Average over batches of this many windows, as the model card does. \\[default: as in training]",
        ),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Compare with n-gram models of the training split.")
    ] = True,
    output: Annotated[
        str | None,
        typer.Option(
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
        from lumiere.report.figures.figure import check_drawing, check_picture

        check_picture(Path(output))
        check_drawing()
    open_text = opener(TextChoice(text, dataset, subset, split))

    from lumiere.cli.scores import Evaluated, as_values, show
    from lumiere.device import keep_freed_memory

    keep_freed_memory()
    evaluated: list[Evaluated] = []
    for reference in dict.fromkeys(runs):
        opened = open_model(reference, checkpoint, device, runs_dir)
        if any(opened.run == other.run for other in evaluated):
            continue
        scored = open_text(opened)
        if evaluated:
            check_same_text(evaluated[0], opened, scored)
        found = evaluate_one(opened, scored, stride, batch_size, baselines)
        evaluated.append(Evaluated(opened.run, opened.tokenizer.fingerprint, about(opened, scored, stride), found))
    for one in evaluated:
        keep(one)
    if output is not None:
        draw(evaluated, output)
    if as_json:
        print_json(as_values(evaluated))
    else:
        show(evaluated)


def evaluate_one(
    opened: OpenedModel, scored: "ScoredText", stride: int | None, batch_size: int | None, with_baselines: bool
) -> "DetailedEvaluation":
    from lumiere.evaluation.detailed import evaluate_in_detail
    from lumiere.evaluation.ngrams import fit_baselines
    from lumiere.evaluation.scoring import strided_windows, training_windows

    context_size, train = opened.config.model.context_size, scored.train
    if stride is not None:
        windows, protocol = strided_windows(scored.split, context_size, stride)
    else:
        windows, protocol = training_windows(scored.split, context_size, opened.config.dataset.sliding_window_size)
    fitted = None
    if with_baselines and train is not None:
        fitted = fit_baselines(train.ids, train.offsets, opened.model.vocab_size)
    # As in training, so that the run's card and `eval` print the same averages.
    batch_size = batch_size or opened.config.training.batch_size
    return evaluate_in_detail(
        opened.model, scored.split, scored.sizes, windows, protocol, batch_size, train, baselines=fitted
    )


def about(opened: OpenedModel, scored: "ScoredText", stride: int | None) -> dict[str, Any]:
    """Describe what was scored, and how."""
    config = opened.config
    overlap = config.dataset.sliding_window_size if stride is None else config.model.context_size + 1 - stride
    return {
        "run": opened.run.name,
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "corpus": scored.corpus,
        "corpus_sha256": scored.split.facts.sha256,
        "documents": scored.split.facts.num_documents,
        "num_bytes": scored.split.facts.num_bytes,
        "num_normalized_bytes": scored.split.facts.num_normalized_bytes,
        "num_words": scored.split.facts.num_words,
        "context_size": config.model.context_size,
        "sliding_window_size": overlap,
        "protocol": "windows" if stride is None else f"stride-{stride}",
        "stride": config.model.context_size + 1 - overlap,
        "tokens_scored": tokens_scored(overlap, stride is not None),
    }


def tokens_scored(overlap: int, once: bool) -> str:
    """Describe how often tokens are scored. Windows that share a single token predict none twice."""
    if once or overlap == 1:
        return "each token is scored once"
    return "tokens in an overlap are scored twice" if overlap else "the first token of a window is not scored"


def check_same_text(first: "Evaluated", opened: OpenedModel, scored: "ScoredText") -> None:
    if scored.split.facts.sha256 != first.about["corpus_sha256"]:
        raise LumiereError(
            f"{scored.corpus} differs between run {opened.run.id} and run {first.run.id}",
            "score both on the same text with --text FILE or --dataset NAME",
        )


def draw(evaluated: list["Evaluated"], output: str) -> None:
    from lumiere.cli.scores import heading, windowing
    from lumiere.report.figures.curves import EvaluationPlot, save_evaluation_plots

    first = evaluated[0]
    text = heading(first.about, with_windows=all(windowing(one) == windowing(first) for one in evaluated))
    plots = [EvaluationPlot(f"{one.run.id}, {one.about['checkpoint']}", one.found) for one in evaluated]
    save_evaluation_plots(Path(output), plots, text)
    show_note(f"wrote {printable(output)}")


def keep(one: "Evaluated") -> None:
    """Save an evaluation in its run's folder, or note why that failed."""
    from lumiere.cli.scores import values_of
    from lumiere.persistence.notes import evaluation_name, save_evaluation

    facts = one.about
    name = evaluation_name(facts["checkpoint"], facts["corpus"], facts["corpus_sha256"], facts["protocol"])
    try:
        path = save_evaluation(one.run, name, values_of(one))
    except LumiereError as error:
        show_note(f"not saved: {error.message}")
    else:
        show_note(f"saved as {path.relative_to(one.run.path.parent)}")


@dataclass(frozen=True)
class ScoredText:
    """A text in a model's tokens.

    Attributes:
        corpus: Name of the text.
        sizes: Sizes of each document.
        train: Split that the model was trained on; None if it is not available.
    """

    corpus: str
    split: "TokenizedSplit"
    sizes: "Sizes"
    train: "TokenizedSplit | None"


@dataclass(frozen=True)
class TextChoice:
    """The text options; at most one of `text` and `dataset` is set.

    Attributes:
        text: A file, or `-` for stdin.
        dataset, subset: As in the config.
        split: Split of the dataset, or of the run's own corpus.
    """

    text: str | None
    dataset: str | None
    subset: str | None
    split: str | None


Opener = Callable[[OpenedModel], ScoredText]


def opener(choice: TextChoice) -> Opener:
    """Return a function that reads the chosen text in the tokens of a run's model.

    Raises:
        LumiereError: The options contradict each other, or the text cannot be read.
    """
    if choice.text is not None and choice.dataset is not None:
        raise LumiereError("--text and --dataset exclude each other", "use one of them")
    if choice.subset is not None and choice.dataset is None:
        raise LumiereError("--subset needs --dataset", "name the dataset")
    if choice.text is not None:
        if choice.split is not None:
            raise LumiereError("--split does not apply to --text", "leave it out")
        read = document_reader(choice.text)
        name = "stdin" if choice.text == "-" else choice.text
        return lambda opened: whole_text(opened, read, name)
    split = choice.split or "validation"
    if choice.dataset is not None:
        return lambda opened: dataset_split(opened, choice, split)
    return lambda opened: own_split(opened, split)


def whole_text(opened: OpenedModel, read: Callable[[], Iterator["Part"]], name: str) -> ScoredText:
    """Read a text as one document."""
    from lumiere.data.dataset import document_sizes, tokenize_parts

    split = tokenize_parts(read(), opened.tokenizer)
    return ScoredText(name, split, document_sizes(read(), split, opened.tokenizer), training_split(opened))


def own_split(opened: OpenedModel, split: str) -> ScoredText:
    """Read a split of the corpus that the model was trained on."""
    from lumiere.data.dataset import document_sizes, source_parts

    corpus = open_corpus(opened, "restore it, or score a text with --text FILE")
    check_split(split, corpus.splits)
    dataset = opened.config.dataset
    documents, are_decoded = source_parts(dataset, corpus, split)
    sizes = document_sizes(documents, corpus.splits[split], opened.tokenizer, are_decoded)
    return ScoredText(corpus_name(dataset, split), corpus.splits[split], sizes, corpus.splits["train"])


def dataset_split(opened: OpenedModel, choice: TextChoice, split: str) -> ScoredText:
    """Read a split of any dataset without caching it."""
    from lumiere.config.loader import validate
    from lumiere.data.corpus import load_corpus
    from lumiere.data.dataset import document_sizes, tokenize_parts
    from lumiere.data.sources import BUILDERS

    if choice.dataset in BUILDERS:
        raise LumiereError(f"{choice.dataset!a} reads files, and none is named", "score a file with --text FILE")
    own = opened.config.dataset
    values = {"name": choice.dataset, "subset": choice.subset, "sliding_window_size": own.sliding_window_size}
    if own.name == choice.dataset:  # its rows form documents in the same way
        values |= {"document_start": own.document_start, "text_column": own.text_column}
    dataset = validate({"dataset": values, "model": {"context_size": opened.config.model.context_size}}).dataset
    corpus = load_corpus(dataset)
    check_split(split, corpus.splits)
    tokenized = tokenize_parts(corpus.parts(split), opened.tokenizer)
    sizes = document_sizes(corpus.parts(split), tokenized, opened.tokenizer)
    return ScoredText(corpus_name(dataset, split), tokenized, sizes, training_split(opened))


def training_split(opened: OpenedModel) -> "TokenizedSplit | None":
    """Return the split that the model was trained on, or None: only n-gram baselines need it."""
    try:
        return open_corpus(opened, "").splits["train"]
    except LumiereError as error:
        show_note(f"{error.message}: skipping baselines and losses by frequency")
        return None


def corpus_name(dataset: "DatasetConfig", split: str) -> str:
    return " ".join(filter(None, [dataset.name, dataset.subset, split]))


def check_split(split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        guess = nearest(split, splits)
        hint = f"it has {', '.join(splits)}" + (f"; did you mean {guess}?" if guess else "")
        raise DataError(f"the corpus has no split '{split}'", hint)


def document_reader(path: str) -> Callable[[], Iterator["Part"]]:
    """Return a function that reads a file, or stdin where the path is `-`, as one document; any number of times.

    Raises:
        LumiereError: It cannot be read, is not UTF-8, or holds no text.
    """
    from lumiere.data.text import blocks, decoded, parts

    data = sys.stdin.buffer.read() if path == "-" else None

    def read() -> Iterator["Part"]:
        return parts(blocks(path) if data is None else decoded(io.BytesIO(data), "stdin"))

    if next(read(), None) is None:
        raise DataError("the text is empty", "score a text that is not")
    return read
