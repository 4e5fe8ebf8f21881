"""`lumiere eval`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lumiere.cli.console import escape, out, print_json
from lumiere.cli.loading import open_corpus, open_model
from lumiere.cli.options import CheckpointName, Device, Json, RunReference, RunsDir
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.evaluation import Evaluation


def evaluate(
    run: RunReference,
    checkpoint: CheckpointName = "best",
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "validation",
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--text", metavar="FILE", help="Score this UTF-8 text file instead of a split."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Windows of a batch; the card's two averages depend on it.")
    ] = 32,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint: loss, perplexity, the card's two averages, bits per byte, word perplexity."""
    from lumiere.data.dataset import tokenize_text
    from lumiere.evaluation import evaluate as evaluate_windows
    from lumiere.training.memory import keep_freed_memory

    keep_freed_memory()
    opened = open_model(run, checkpoint, device, runs_dir)
    config = opened.config
    if text is not None:
        scored = tokenize_text(read_text(text), opened.tokenizer)
        windows = scored.windows(config.model.context_size, config.dataset.sliding_window_size)
        source = str(text)
    else:
        corpus = open_corpus(opened, "restore it as it was, or score a text with --text FILE")
        windows = corpus.windows(split, config)
        scored = corpus.splits[split]
        source = " ".join(filter(None, [config.dataset.name, config.dataset.subset, split]))
    evaluation = evaluate_windows(opened.model, windows, scored.facts, batch_size)
    about = {
        "run": opened.run.name,
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "corpus": source,
        "corpus_sha256": scored.facts.sha256,
        "documents": scored.facts.num_documents,
        "context_size": config.model.context_size,
        "sliding_window_size": config.dataset.sliding_window_size,
    }
    if as_json:
        print_json(about | asdict(evaluation))
    else:
        show(about, evaluation)


def read_text(path: Path) -> str:
    """The text in a file.

    Raises:
        LumiereError: if it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LumiereError(f"{path} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise LumiereError(f"{path} cannot be read: {error.strerror}", "check the path") from None


def show(about: dict[str, Any], evaluation: "Evaluation") -> None:
    out().print(f"[bold]{about['run']}[/], checkpoint {about['checkpoint']} (step {about['step']:,})")
    out().print(
        f"{escape(about['corpus'])}: {about['documents']:,} documents, windows of {about['context_size']} tokens "
        f"that overlap by {about['sliding_window_size']}\n"
    )
    rows = [
        ("loss", f"{evaluation.loss:.4f}", "nats a token"),
        ("perplexity", f"{evaluation.perplexity:,.2f}", "exp(loss)"),
        ("bits per byte", f"{evaluation.bits_per_byte:.4f}", "comparable between tokenizers"),
        ("word perplexity", f"{evaluation.word_perplexity:,.1f}", "words by white space, line ends counted"),
        ("mean batch loss", f"{evaluation.mean_batch_loss:.4f}", "the card's loss (4.4180)"),
        ("mean batch perplexity", f"{evaluation.mean_batch_perplexity:,.2f}", "the card's perplexity (85.01)"),
    ]
    for name, value, meaning in rows:
        out().print(f"[bold]{name:21}[/]  {value:>10}  [dim]{meaning}[/]")
    out().print(
        f"\n{evaluation.num_tokens:,} tokens in {evaluation.num_windows:,} windows, "
        f"{evaluation.num_batches:,} batches of {evaluation.batch_size}, {evaluation.seconds:.1f} s"
    )
