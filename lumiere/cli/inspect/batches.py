"""The sequences over which an analysis takes means: windows of the validation split, random repeats, or one text."""

from typing import TYPE_CHECKING

from lumiere.cli.inspect.analysis import Subject
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.data.batches import Batch
    from lumiere.data.dataset import TokenizedCorpus


def choose_batches(subject: Subject, num_batches: int, batch_size: int) -> tuple[list["Batch"], str | None]:
    """Batches of inputs and targets, and where they come from; None where it is the subject's one text.

    Without any text, windows of the validation split are drawn by the seed, none twice. With `--random S`, there are as
    many sequences of S random tokens, twice, and tokens 2 to S of the second copy are to be predicted.

    Raises:
        LumiereError: as `choose_text`, or the text has one token, with nothing to predict.
    """
    length = subject.text["random"]
    given = [name for name, value in subject.text.items() if value is not None]
    if not given:
        return validation_batches(subject, num_batches, batch_size)
    if given == ["random"]:
        return random_batches(subject, length, num_batches, batch_size)
    return [batch_of([subject.tokens])], None


def validation_batches(subject: Subject, num_batches: int, batch_size: int) -> tuple[list["Batch"], str]:
    from lumiere.persistence.loading import open_corpus

    corpus = open_corpus(subject.opened, "restore it as it was, or give a text with --prompt, --file or --random")
    return drawn_batches(subject, corpus, num_batches, batch_size)


def drawn_batches(
    subject: Subject, corpus: "TokenizedCorpus", num_batches: int, batch_size: int
) -> tuple[list["Batch"], str]:
    """Windows of the validation split, drawn by the seed, and words that say so."""
    import numpy as np

    from lumiere.data.batches import make_batch, permute

    opened = subject.opened
    windows = corpus.windows("validation", opened.config)
    count = min(num_batches * batch_size, len(windows))
    drawn = permute(np.arange(count), len(windows), key=str(subject.seed))
    batches = [make_batch(windows, part) for part in np.array_split(drawn, min(num_batches, count))]
    source = f"{count:,} of {len(windows):,} windows of the validation split of {opened.config.dataset.name}"
    return batches, f"{source} (seed {subject.seed}), in {counted_batches(len(batches))}"


def random_batches(subject: Subject, length: int, num_batches: int, batch_size: int) -> tuple[list["Batch"], str]:
    from lumiere.cli.inspect.texts import repeated_sequences
    from lumiere.interpret.head_scores import first_copied

    if length < 2:
        raise LumiereError(f"--random {length} leaves nothing to predict in the second copy", "give --random 2 or more")
    count = num_batches * batch_size
    sequences, origin = repeated_sequences(subject.opened, length, count, subject.seed)
    parts = [sequences[first : first + batch_size] for first in range(0, count, batch_size)]
    source = (
        f"{count:,} x {length} random tokens {origin}, twice (seed {subject.seed}), in {counted_batches(num_batches)}"
    )
    return [
        batch_of(part, first_copied(length)) for part in parts
    ], f"{source}; loss of tokens 2 to {length} of the second copy"


def counted_batches(count: int) -> str:
    return "1 batch" if count == 1 else f"{count:,} batches"


def counted_documents(count: int, *, are_windows: bool) -> str:
    """The number of independent texts behind a standard error, and whether it is small.

    Args:
        are_windows: whether the texts are windows of documents; otherwise each sequence is a text of its own.
    """
    from lumiere.evaluation.scoring import FEW_DOCUMENTS

    units = "documents" if are_windows else "sequences"
    return f"{count:,} {units}" if count >= FEW_DOCUMENTS else f"few {units}: {count:,}"


def batch_of(sequences: "list[tuple[int, ...]]", first_target: int = 1) -> "Batch":
    """Sequences of one length as a batch.

    Args:
        first_target: the first position whose prediction counts.

    Raises:
        LumiereError: they have one token.
    """
    import torch

    from lumiere.components.kernels import IGNORED
    from lumiere.data.batches import Batch

    tokens = torch.tensor(sequences)
    if tokens.shape[1] < 2:
        raise LumiereError("the text has one token, and nothing to predict from it", "give a longer one")
    targets = tokens[:, 1:].clone()
    targets[:, : first_target - 1] = IGNORED
    return Batch(tokens[:, :-1].contiguous(), targets, int((targets != IGNORED).sum()))
