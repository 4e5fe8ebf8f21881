"""From what the user names to the text that `lumiere eval` scores."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumiere.cli.console import show_note
from lumiere.errors import DataError, LumiereError, nearest
from lumiere.persistence.loading import OpenedModel, open_corpus

if TYPE_CHECKING:
    from lumiere.config.schema import DatasetConfig
    from lumiere.data.dataset import Sizes, TokenizedSplit
    from lumiere.data.text import Part


@dataclass(frozen=True)
class ScoredText:
    """A text in a model's tokens.

    Attributes:
        corpus: what it is called.
        sizes: of each document.
        train: the split that the model was trained on; None where it is not at hand.
    """

    corpus: str
    split: "TokenizedSplit"
    sizes: "Sizes"
    train: "TokenizedSplit | None"


@dataclass(frozen=True)
class TextChoice:
    """What the user named; at most one of `text` and `dataset`.

    Attributes:
        text: a file, or `-` for stdin.
        dataset, subset: as in the config.
        split: of the dataset, or of the run's own corpus.
    """

    text: str | None
    dataset: str | None
    subset: str | None
    split: str | None


Opener = Callable[[OpenedModel], ScoredText]


def opener(choice: TextChoice) -> Opener:
    """A function that gives the text in the tokens of any run's model; what is read once is read here.

    Raises:
        LumiereError: the choice contradicts itself, or the text cannot be read.
    """
    if choice.text is not None and choice.dataset is not None:
        raise LumiereError("--text and --dataset both name a text", "give one of them")
    if choice.subset is not None and choice.dataset is None:
        raise LumiereError("--subset belongs to a dataset", "name it with --dataset")
    if choice.text is not None:
        if choice.split is not None:
            raise LumiereError("a text has no splits", "leave --split away")
        read = document_reader(choice.text)
        name = "stdin" if choice.text == "-" else choice.text
        return lambda opened: whole_text(opened, read, name)
    split = choice.split or "validation"
    if choice.dataset is not None:
        return lambda opened: dataset_split(opened, choice, split)
    return lambda opened: own_split(opened, split)


def whole_text(opened: OpenedModel, read: Callable[[], Iterator["Part"]], name: str) -> ScoredText:
    """A text as one document."""
    from lumiere.data.dataset import document_sizes, tokenize_parts

    split = tokenize_parts(read(), opened.tokenizer)
    return ScoredText(name, split, document_sizes(read(), split, opened.tokenizer), training_split(opened))


def own_split(opened: OpenedModel, split: str) -> ScoredText:
    """A split of the corpus that the model was trained on."""
    from lumiere.data.dataset import document_sizes, source_parts

    corpus = open_corpus(opened, "restore it as it was, or score a text with --text FILE")
    check_split(split, corpus.splits)
    dataset = opened.config.dataset
    documents, are_decoded = source_parts(dataset, corpus, split)
    sizes = document_sizes(documents, corpus.splits[split], opened.tokenizer, are_decoded)
    return ScoredText(corpus_name(dataset, split), corpus.splits[split], sizes, corpus.splits["train"])


def dataset_split(opened: OpenedModel, choice: TextChoice, split: str) -> ScoredText:
    """A split of any dataset, in the model's tokens; nothing is kept of it."""
    from lumiere.config.loader import validate
    from lumiere.data.corpus import load_corpus
    from lumiere.data.dataset import document_sizes, tokenize_parts
    from lumiere.data.sources import BUILDERS

    if choice.dataset in BUILDERS:
        raise LumiereError(f"{choice.dataset!a} reads files, which nothing names here", "score one with --text FILE")
    own = opened.config.dataset
    values = {"name": choice.dataset, "subset": choice.subset, "sliding_window_size": own.sliding_window_size}
    if own.name == choice.dataset:  # how its rows make documents is known
        values |= {"document_start": own.document_start, "text_column": own.text_column}
    dataset = validate({"dataset": values, "model": {"context_size": opened.config.model.context_size}}).dataset
    corpus = load_corpus(dataset)
    check_split(split, corpus.splits)
    tokenized = tokenize_parts(corpus.parts(split), opened.tokenizer)
    sizes = document_sizes(corpus.parts(split), tokenized, opened.tokenizer)
    return ScoredText(corpus_name(dataset, split), tokenized, sizes, training_split(opened))


def training_split(opened: OpenedModel) -> "TokenizedSplit | None":
    """What the model was trained on, if it can be had: only the comparison with counting needs it."""
    try:
        return open_corpus(opened, "").splits["train"]
    except LumiereError as error:
        show_note(f"{error.message}: no baselines, and no losses by frequency")
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
        raise DataError("the text is empty", "give some text")
    return read
