"""Scoring a run's model on a split, a text or a dataset, with the picture and the values of `lumiere eval`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.errors import DataError, LumiereError, check_choice, refuse_both
from lumiere.persistence.loading import OpenedModel, open_corpus
from lumiere.persistence.metrics import to_json
from lumiere.persistence.notes import evaluation_name, save_evaluation
from lumiere.persistence.runs import Run

if TYPE_CHECKING:
    from lumiere.config.schema import DatasetConfig
    from lumiere.data.dataset import Sizes, TokenizedSplit
    from lumiere.data.text import Part
    from lumiere.evaluation.detailed import DetailedEvaluation
    from lumiere.evaluation.scoring import Protocol
    from lumiere.report.figures.figure import Picture


Strings = tuple[str, Callable[[], Iterable[str]]]
"""The name of a text, and a function that returns the strings that make it up."""


@dataclass(frozen=True)
class Evaluated:
    """A run and its evaluation. A notebook shows its picture.

    Attributes:
        tokenizer: Fingerprint of the tokenizer.
        about: What was scored, and how, as in the JSON.
        found: All metrics. Their averages, such as `loss`, are attributes of the evaluation too.
        notes: What was left out, and why.
    """

    run: Run = field(repr=False)
    tokenizer: str = field(repr=False)
    about: dict[str, Any]
    found: "DetailedEvaluation" = field(repr=False)
    notes: tuple[str, ...] = ()

    @cached_property
    def values(self) -> dict[str, Any]:
        """The evaluation as JSON values, with the names of lm-eval."""
        found = self.found
        return {
            **self.about,
            **asdict(found.evaluation),
            "byte_perplexity": found.byte_perplexity,
            "normalized_share": found.normalized_share,
            "accuracy": found.accuracy,
            "accuracy_at_5": found.accuracy_at_5,
            "standard_errors": found.standard_errors,
            "bootstrap": {"over": "documents", "num_resamples": found.num_resamples, "seed": found.seed},
            "baselines": None if found.baselines is None else [asdict(baseline) for baseline in found.baselines],
            "calibration": asdict(found.calibration),
            "by_position": asdict(found.by_position),
            "by_frequency": None if found.by_frequency is None else asdict(found.by_frequency),
            "by_document": asdict(found.by_document),
        }

    @property
    def windowing(self) -> tuple[Any, ...]:
        return tuple(self.about[key] for key in ("context_size", "stride", "protocol"))

    def keep(self) -> Path:
        """Save the values in the run's folder, where `lumiere runs show` finds them; return the path.

        Raises:
            LumiereError: The file cannot be written.
        """
        keys = ("checkpoint", "corpus", "corpus_sha256", "protocol")
        return save_evaluation(self.run, evaluation_name(*(self.about[key] for key in keys)), self.values)

    def save(self, path: str | Path) -> None:
        """Write the values to .json, or the picture to .html, .svg or .png.

        Raises:
            LumiereError: Unknown suffix, the file cannot be written, or matplotlib, for a picture, is missing.
        """
        from lumiere.report.figures.figure import check_picture, save_picture, write_output

        path = Path(path)
        if path.suffix.lower() == ".json":
            write_output(path, (to_json(self.values, indent=2) + "\n").encode())
        else:
            check_picture(path)
            save_picture(path, draw([self]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # such as what notebooks and `copy` look for
            raise AttributeError(name)
        return getattr(self.found.evaluation if hasattr(self.found.evaluation, name) else self.found, name)

    def _repr_html_(self) -> str:
        from lumiere.report.fragments import fragment

        names = ("loss", "perplexity", "bits_per_byte", "word_perplexity", "accuracy")
        values = ", ".join(f"{name.replace('_', ' ')} {self.values[name]:,.4f}" for name in names)
        facts = f"{self.run.name}, checkpoint {self.about['checkpoint']} (step {self.about['step']:,}); {values}"
        return fragment("Evaluation", facts, lambda: draw([self]), self.notes)


def have_one_windowing(evaluated: Sequence[Evaluated]) -> bool:
    return len({one.windowing for one in evaluated}) == 1


def draw(evaluated: Sequence[Evaluated]) -> "Picture":
    """Draw losses and calibration, under a line that says what was scored and how."""
    from lumiere.report.figures.curves import draw_evaluations

    about = evaluated[0].about
    text = f"{about['corpus']} ({about['corpus_sha256'][:8]})"
    if have_one_windowing(evaluated):
        strided = "strided, " if about["protocol"] not in ("windows", "last") else ""
        text += f", {strided}windows of {about['context_size']} tokens, {placed(about)}"
    plots = [(f"{one.run.id}, {one.about['checkpoint']}", one.found) for one in evaluated]
    return draw_evaluations(plots, text)


def placed(about: dict[str, Any]) -> str:
    """Describe where the windows of an evaluation are."""
    if about["protocol"] == "last":
        return "one at the end of each text"
    return f"each {about['stride']} after the one before"


@dataclass(frozen=True)
class ScoredText:
    """A text in a model's tokens.

    Attributes:
        corpus: Name of the text.
        sizes: Sizes of each document.
        train: Split that the model was trained on; None if it is not available.
        notes: Why it is not.
    """

    corpus: str
    split: "TokenizedSplit"
    sizes: "Sizes"
    train: "TokenizedSplit | None"
    notes: tuple[str, ...] = ()


def text_reader(
    texts: Mapping[str, Strings | None], dataset: str | None, subset: str | None, split: str | None
) -> Callable[[OpenedModel], ScoredText]:
    """Return a function that reads the chosen text in the tokens of a run's model.

    Args:
        texts: Texts by the name of the option that gives them.

    Raises:
        LumiereError: The options contradict each other, or the text cannot be read.
    """
    refuse_both({**texts, "--dataset": dataset})
    refuse_both({**texts, "--split": split})
    if subset is not None and dataset is None:
        raise LumiereError("--subset needs --dataset", "name the dataset")
    for name, strings in filter(None, texts.values()):
        return partial(tokenized, name, document_reader(strings))
    if dataset is None:
        return partial(own_split, split or "validation")
    return partial(dataset_split, dataset, subset, split or "validation")


def tokenized(corpus: str, read: Callable[[], Iterable["Part"]], opened: OpenedModel) -> ScoredText:
    """Tokenize documents without caching them."""
    from lumiere.data.dataset import document_sizes, tokenize_parts

    split, train, notes = tokenize_parts(read(), opened.tokenizer), None, ()
    sizes = document_sizes(read(), split, opened.tokenizer)
    try:
        train = open_corpus(opened, "").splits["train"]
    except LumiereError as error:  # only n-gram baselines and losses by frequency need it
        notes = (f"{error.message}: skipping baselines and losses by frequency",)
    return ScoredText(corpus, split, sizes, train, notes)


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


def document_reader(pieces: Callable[[], Iterable[str]]) -> Callable[[], Iterator["Part"]]:
    """Return a function that reads strings as one document; any number of times.

    Args:
        pieces: Returns the strings that make up the text.

    Raises:
        LumiereError: They cannot be read, or hold no text.
    """
    from lumiere.data.text import parts

    def read() -> Iterator["Part"]:
        return parts(pieces())

    if next(read(), None) is None:
        raise DataError("the text is empty", "score a text that is not")
    return read


def evaluate_one(
    opened: OpenedModel, scored: ScoredText, stride: int | None, batch_size: int | None, with_baselines: bool
) -> Evaluated:
    """Score a text, and describe what was scored and how."""
    from lumiere.evaluation.detailed import evaluate_in_detail
    from lumiere.evaluation.ngrams import fit_baselines
    from lumiere.evaluation.scoring import strided_windows, training_windows

    split, train, config = scored.split, scored.train, opened.config
    context_size, facts = opened.context_size, split.facts
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
    return Evaluated(opened.run, opened.tokenizer.fingerprint, about, found, scored.notes)


def tokens_scored(overlap: int, protocol: "Protocol") -> str:
    """Describe how often tokens are scored. Windows that share a single token predict none twice."""
    if protocol.only_last:
        return "the last token of each text is scored"
    if protocol.once or overlap == 1:
        return "each token is scored once"
    return "tokens in an overlap are scored twice" if overlap else "the first token of a window is not scored"


def evaluate(
    opened: OpenedModel,
    split: str | None,
    text: str | None,
    file: str | Path | None,
    dataset: str | None,
    subset: str | None,
    stride: int | None,
    batch_size: int | None,
    baselines: bool,
) -> Evaluated:
    """Score a split, a text, a file or a dataset; see `OpenedRun.evaluate`."""
    from lumiere.data.text import blocks, plain

    texts: dict[str, Strings | None] = {
        "text": None if text is None else ("text", lambda: [plain(text)]),
        "file": None if file is None else (str(file), lambda: blocks(str(file))),
    }
    read = text_reader(texts, dataset, subset, split)
    return evaluate_one(opened, read(opened), stride, batch_size, baselines)
