"""`lumiere inspect diff`."""

from typing import TYPE_CHECKING, Annotated

import typer

from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.cli.inspect.options import TopK
from lumiere.errors import LumiereError
from lumiere.persistence.loading import OpenedModel, open_corpus

if TYPE_CHECKING:
    from lumiere.data.text import Part
    from lumiere.interpret.model_diff import ModelDiff
    from lumiere.models.transformer import Transformer

AcrossLayers = Annotated[
    bool, typer.Option("--across-layers", help="Match heads of any layers, and not only of the same one.")
]
Batches = Annotated[int, typer.Option("--batches", metavar="N", min=1, help="Batches to take the means over.")]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Sequences of a batch.")]


@analysis(text=True, pair=True)
def diff(
    subject: Subject,
    across_layers: AcrossLayers = False,
    batches: Batches = 4,
    batch_size: BatchSize = 32,
    top_k: TopK = 5,
) -> "Analysis[ModelDiff]":
    """What is different between two runs, or two checkpoints of one? Predictions, layers, heads and weights.

    Without any text, over windows of the validation split of A. Where the tokenizers differ, only bits per byte and
    weights are compared.
    """
    from lumiere.cli.inspect.batches import choose_batches
    from lumiere.cli.inspect.diff_view import show
    from lumiere.interpret.model_diff import diff as diff_models
    from lumiere.report.figures.bars import draw_diff

    opened, other = subject.opened, subject.other
    assert other is not None  # the decorator has opened both
    if has_other_tokens(opened, other):
        return diff_by_bytes(subject, other, across_layers, batches * batch_size, top_k)
    sequences, source = choose_batches(subject, batches, batch_size)
    return Analysis(
        compute=lambda model: diff_models(model, like(other.model, model), sequences, across_layers=across_layers),
        show=lambda result: show(result, opened, other, top_k),
        draw=draw_diff,
        source=source,
    )


def has_other_tokens(opened: OpenedModel, other: OpenedModel) -> bool:
    return (opened.tokenizer.fingerprint, opened.model.vocab_size) != (
        other.tokenizer.fingerprint,
        other.model.vocab_size,
    )


def like(model: "Transformer", example: "Transformer") -> "Transformer":
    """A model, or a copy of it, on the device and in the type of another one."""
    from copy import deepcopy

    weight, own = example.token_embedding.weight, model.token_embedding.weight
    if (weight.device, weight.dtype) == (own.device, own.dtype):
        return model
    return deepcopy(model).to(device=weight.device, dtype=weight.dtype)


def diff_by_bytes(
    subject: Subject, other: OpenedModel, across_layers: bool, num_windows: int, top_k: int
) -> "Analysis[ModelDiff]":
    """The analysis of two models whose tokenizers differ.

    Raises:
        LumiereError: a text or heads were asked for that only models with one tokenizer have in common.
    """
    from lumiere.cli.inspect.diff_view import show
    from lumiere.data.dataset import document_sizes, tokenize_parts
    from lumiere.interpret.model_diff import diff_texts
    from lumiere.report.figures.bars import draw_diff

    if across_layers:
        raise LumiereError("the tokenizers differ, so no heads are matched", "leave --across-layers away")
    documents, source = choose_documents(subject, num_windows)
    tokenizers = [opened.tokenizer for opened in (subject.opened, other)]
    splits = [tokenize_parts(documents, tokenizer) for tokenizer in tokenizers]
    texts = [(split, document_sizes(documents, split, own)) for split, own in zip(splits, tokenizers, strict=True)]
    return Analysis(
        compute=lambda model: diff_texts(model, like(other.model, model), texts),
        show=lambda result: show(result, subject.opened, other, top_k),
        draw=draw_diff,
        source=source,
    )


def choose_documents(subject: Subject, num_windows: int) -> tuple[list["Part"], str]:
    """Whole texts in parts, and where they come from.

    Without any choice these are documents of the validation split, drawn by the seed.

    Args:
        num_windows: so many windows of A's have about as many tokens as the documents that are drawn.

    Raises:
        LumiereError: the text is given as tokens or holds nothing, or the corpus is not there.
    """
    text = subject.text
    given = [name for name, value in text.items() if value is not None]
    if len(given) > 1:
        raise LumiereError(f"{' and '.join(f'--{spelled(name)}' for name in given)} are two texts", "choose one")
    if text["random"] is not None or text["window"] is not None:
        raise LumiereError(
            f"the tokenizers differ, and --{spelled(given[0])} gives tokens of A", "give a text: --prompt or --file"
        )
    if given:
        from lumiere.data.text import blocks, parts, plain

        documents = list(parts([plain(text["prompt"])] if text["prompt"] is not None else blocks(str(text["file"]))))
        if not documents:
            raise LumiereError("the text is empty", "give some, or leave it out for the validation split")
        return documents, "prompt" if text["prompt"] is not None else str(text["file"])
    return validation_documents(subject, num_windows)


def spelled(name: str) -> str:
    """The option of that name, as it is typed."""
    return "val" if name == "window" else name


def validation_documents(subject: Subject, num_windows: int) -> tuple[list["Part"], str]:
    import numpy as np

    from lumiere.data.batches import permute
    from lumiere.data.corpus import numbered_parts
    from lumiere.data.dataset import source_parts

    opened = subject.opened
    corpus = open_corpus(opened, "restore it as it was, or give a text: --prompt or --file")
    offsets = corpus.splits["validation"].offsets
    count = len(offsets) - 1
    order = permute(np.arange(count), count, key=str(subject.seed))
    reached = np.cumsum(np.diff(offsets)[order])
    enough = int(np.searchsorted(reached, num_windows * opened.config.model.context_size)) + 1
    chosen = set(order[:enough].tolist())
    dataset = opened.config.dataset
    parts, _ = source_parts(dataset, corpus, "validation")
    return [part for number, part in numbered_parts(parts) if number in chosen], (
        f"{len(chosen):,} of {count:,} documents of the validation split of {dataset.name} (seed {subject.seed})"
    )
