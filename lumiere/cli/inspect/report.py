"""`lumiere inspect report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lumiere.cli.console import guarded, open_model, show_note, stderr, stdout
from lumiere.cli.inspect.analysis import CHECK_FAILED, Subject
from lumiere.cli.inspect.options import Seed
from lumiere.cli.options import CheckpointName, Device, RunOption, RunsDir
from lumiere.errors import LumiereError
from lumiere.persistence.loading import OpenedModel

if TYPE_CHECKING:
    from lumiere.report.report_page import Text

WINDOWS = 256
"""Validation windows for the ablation and the neurons."""
BATCH_SIZE = 32
SHOWN_WINDOWS = 2
REPEATED = 12
"""Random tokens, twice, that are shown as a text: what an induction head is for is best seen there."""

Prompts = Annotated[
    Optional[list[str]],  # noqa: UP045 (Typer reads this form)
    typer.Option("--prompt", "-p", metavar="TEXT", help="A text to explore; can be given several times."),
]
Page = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page, which is overwritten: .html.")]


@guarded
def report(
    prompt: Prompts = None,
    output: Page = Path("report.html"),
    seed: Seed = 0,
    run: RunOption = "latest",
    checkpoint: CheckpointName = "best",
    device: Device = "cpu",
    runs_dir: RunsDir = None,
) -> None:
    """One page that shows the model from all sides, and opens in a browser from the disk, without a network.

    Click a word to see where each head looks from it, what each layer would say next, and which part pushed which
    word. Without --prompt it shows two texts of the validation split and random tokens that come twice.
    """
    check_page(output)
    from lumiere.device import keep_freed_memory
    from lumiere.files import write_atomically
    from lumiere.interpret.head_scores import SEQUENCES
    from lumiere.persistence.metrics import read_history
    from lumiere.report.report_page import build_page, inspect_model

    keep_freed_memory()
    import torch

    from lumiere.cli.inspect.heads import validation_windows
    from lumiere.cli.inspect.summary import choose_text
    from lumiere.cli.inspect.texts import averaged_tokens, repeated_sequences

    opened = open_model(run, checkpoint, device, runs_dir)
    subject = Subject(opened, {}, seed)
    texts = given_texts(opened, prompt) if prompt else chosen_texts(opened, seed)
    batches, token_counts, source = choose_text(subject, WINDOWS)
    sequences, _ = repeated_sequences(opened, None, SEQUENCES, seed)
    averaged, averaged_over = averaged_tokens(opened)
    inspection = inspect_model(
        opened.model,
        texts,
        torch.tensor(sequences),
        batches,
        validation_windows(subject) if batches else None,
        token_counts,
        len(opened.tokenizer),
        averaged,
    )
    about = {
        "run": opened.run.name,
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "source": source,
        "averaged_over": averaged_over,
        "seed": seed,
        "weights_sha256": opened.weights_sha256,
    }
    history = read_history(opened.run.metrics_path, max_points=200)
    page = build_page(inspection, opened.config, history, opened.tokenizer.label, about)
    try:
        write_atomically(output, page.encode())
    except OSError as error:
        raise LumiereError(f"{str(output)!r} cannot be written: {error.strerror}", "choose another place") from error
    stdout().print(f"written to {output}, {len(page.encode()) / 1e6:.1f} MB: open it in a browser", markup=False)
    if broken := [name for name, result in inspection.results() if not result.holds]:
        stderr().print(f"failed: the receipts of {'; '.join(broken)}", style="bold red", markup=False)
        raise typer.Exit(CHECK_FAILED)


def check_page(path: Path) -> None:
    """Refuses a path that no page can be written to, before anything is computed.

    Raises:
        LumiereError: it does not end in .html, it is a folder, or its folder is not there.
    """
    if path.suffix.lower() != ".html":
        raise LumiereError(f"{str(path)!r} is no page", "its name has to end in .html")
    if path.is_dir():
        raise LumiereError(f"{str(path)!r} is a folder", "give the name of a file")
    if not path.parent.is_dir():
        raise LumiereError(f"there is no folder {str(path.parent)!r}", "make it first, or choose another")


def given_texts(opened: OpenedModel, prompts: list[str]) -> "list[Text]":
    from lumiere.cli.inspect.texts import prompt_tokens
    from lumiere.report.report_page import Text

    return [Text(prompt_tokens(opened, prompt), "prompt") for prompt in prompts]


def chosen_texts(opened: OpenedModel, seed: int) -> "list[Text]":
    """Starts of validation windows, spread over the split, and random tokens twice; without a corpus these alone."""
    from lumiere.cli.inspect.texts import DEFAULT_TOKENS, repeated_sequences, validation_window
    from lumiere.persistence.loading import open_corpus
    from lumiere.report.report_page import Text

    texts = []
    try:
        count = len(open_corpus(opened, "restore it as it was").windows("validation", opened.config))
        for number in [count * part // SHOWN_WINDOWS for part in range(SHOWN_WINDOWS)]:
            tokens = validation_window(opened, number)[:DEFAULT_TOKENS]
            if len(tokens) > 1:
                texts.append(Text(tokens, f"window {number} of the validation split"))
    except LumiereError as error:
        show_note(f"{error.message}: only random tokens are shown; --prompt gives a text")
    rows, origin = repeated_sequences(opened, None, 1, seed, at_most=REPEATED)
    return [*texts, Text(rows[0], f"{len(rows[0]) // 2} random tokens {origin}, twice")]
