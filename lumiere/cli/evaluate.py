"""`lumiere eval`."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.cli.console import print_json, show_note
from lumiere.cli.options import CheckpointName, Device, Json, RunReferences, RunsDir, open_model, refuse_both
from lumiere.errors import DataError, LumiereError, check_choice, printable
from lumiere.persistence.loading import OpenedModel, open_corpus
from lumiere.persistence.runs import RunStore

if TYPE_CHECKING:
    from lumiere.cli.scores import Evaluated
    from lumiere.config.schema import DatasetConfig
    from lumiere.data.dataset import Sizes, TokenizedSplit
    from lumiere.data.text import Part


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
    read = text_reader(text, dataset, subset, split)

    from lumiere.cli.scores import Evaluated, as_values, draw, show
    from lumiere.device import keep_freed_memory

    keep_freed_memory()
    evaluated: list[Evaluated] = []
    for run in RunStore(runs_dir).open_all(runs):
        opened = open_model(run.name, checkpoint, device, runs_dir)
        scored = read(opened)
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
        draw(evaluated, Path(output))
        show_note(f"wrote {printable(output)}")
    if as_json:
        print_json(as_values(evaluated))
    else:
        show(evaluated)


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


def evaluate_one(
    opened: OpenedModel, scored: ScoredText, stride: int | None, batch_size: int | None, with_baselines: bool
) -> "Evaluated":
    """Score a text, and describe what was scored and how."""
    from lumiere.cli.scores import Evaluated, tokens_scored
    from lumiere.evaluation.detailed import evaluate_in_detail
    from lumiere.evaluation.ngrams import fit_baselines
    from lumiere.evaluation.scoring import strided_windows, training_windows

    split, train, config = scored.split, scored.train, opened.config
    context_size, facts = config.model.context_size, split.facts
    overlap = config.dataset.sliding_window_size if stride is None else context_size + 1 - stride
    if stride is not None:
        windows, protocol = strided_windows(split, context_size, stride)
    else:
        only_last = config.training.loss_positions == "last"
        windows, protocol = training_windows(split, context_size, overlap, only_last)
    fitted = None
    if with_baselines and train is not None:
        fitted = fit_baselines(train.ids, train.offsets, opened.model.vocab_size)
    # As in training, so that the run's card and `eval` print the same averages.
    batch_size = batch_size or config.training.batch_size
    found = evaluate_in_detail(
        opened.model, split, scored.sizes, windows, protocol, batch_size, train, baselines=fitted
    )
    about = {
        "run": opened.run.name,
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "corpus": scored.corpus,
        "corpus_sha256": facts.sha256,
        "documents": facts.num_documents,
        **{name: getattr(facts, name) for name in ("num_bytes", "num_normalized_bytes", "num_words")},
        "context_size": context_size,
        "sliding_window_size": overlap,
        "protocol": protocol.name,
        "stride": protocol.stride,
        "tokens_scored": tokens_scored(overlap, protocol),
    }
    return Evaluated(opened.run, opened.tokenizer.fingerprint, about, found)


def keep(one: "Evaluated") -> None:
    """Save an evaluation in its run's folder, or note why that failed."""
    from lumiere.persistence.notes import evaluation_name, save_evaluation

    name = evaluation_name(*(one.about[key] for key in ("checkpoint", "corpus", "corpus_sha256", "protocol")))
    try:
        path = save_evaluation(one.run, name, one.values)
    except LumiereError as error:
        show_note(f"not saved: {error.message}")
    else:
        show_note(f"saved as {path.relative_to(one.run.path.parent)}")


def text_reader(
    text: str | None, dataset: str | None, subset: str | None, split: str | None
) -> Callable[[OpenedModel], ScoredText]:
    """Return a function that reads the chosen text in the tokens of a run's model.

    Raises:
        LumiereError: The options contradict each other, or the text cannot be read.
    """
    refuse_both({"--text": text, "--dataset": dataset})
    refuse_both({"--text": text, "--split": split})
    if subset is not None and dataset is None:
        raise LumiereError("--subset needs --dataset", "name the dataset")
    if text is not None:
        return partial(tokenized, "stdin" if text == "-" else text, document_reader(text))
    if dataset is None:
        return partial(own_split, split or "validation")
    return partial(dataset_split, dataset, subset, split or "validation")


def tokenized(corpus: str, read: Callable[[], Iterable["Part"]], opened: OpenedModel) -> ScoredText:
    """Tokenize documents without caching them."""
    from lumiere.data.dataset import document_sizes, tokenize_parts

    split, train = tokenize_parts(read(), opened.tokenizer), None
    sizes = document_sizes(read(), split, opened.tokenizer)
    try:
        train = open_corpus(opened, "").splits["train"]
    except LumiereError as error:  # only n-gram baselines and losses by frequency need it
        show_note(f"{error.message}: skipping baselines and losses by frequency")
    return ScoredText(corpus, split, sizes, train)


def own_split(split: str, opened: OpenedModel) -> ScoredText:
    """Read a split of the corpus that the model was trained on."""
    from lumiere.data.dataset import document_sizes, source_parts

    corpus = open_corpus(opened, "restore it, or score a text with --text FILE")
    check_choice("split", split, corpus.splits)
    dataset = opened.config.dataset
    documents, are_decoded = source_parts(dataset, corpus, split)
    sizes = document_sizes(documents, corpus.splits[split], opened.tokenizer, are_decoded)
    return ScoredText(corpus_name(dataset, split), corpus.splits[split], sizes, corpus.splits["train"])


def dataset_split(name: str, subset: str | None, split: str, opened: OpenedModel) -> ScoredText:
    """Read a split of any dataset."""
    from lumiere.config.loader import validate
    from lumiere.data.corpus import load_corpus
    from lumiere.data.sources import BUILDERS

    if name in BUILDERS:
        raise LumiereError(f"{name!a} reads files, and none is named", "score a file with --text FILE")
    own = opened.config.dataset
    values = {"name": name, "subset": subset, "sliding_window_size": own.sliding_window_size}
    if own.name == name:  # its rows form documents in the same way
        values |= {"document_start": own.document_start, "text_column": own.text_column}
    dataset = validate({"dataset": values, "model": {"context_size": opened.config.model.context_size}}).dataset
    corpus = load_corpus(dataset)
    check_choice("split", split, corpus.splits)
    return tokenized(corpus_name(dataset, split), partial(corpus.parts, split), opened)


def corpus_name(dataset: "DatasetConfig", split: str) -> str:
    return " ".join(filter(None, [dataset.name, dataset.subset, split]))


def document_reader(path: str) -> Callable[[], Iterator["Part"]]:
    """Return a function that reads a file, or stdin if the path is `-`, as one document; any number of times.

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
