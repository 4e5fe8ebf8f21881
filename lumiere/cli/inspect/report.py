"""`lumiere inspect report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Exit, Option

from lumiere.cli.console import CHECK_FAILED, show_note, stderr, stdout
from lumiere.cli.inspect.command import Seed, model_provenance
from lumiere.cli.inspect.inputs import DEFAULT_TOKENS, InspectTarget
from lumiere.cli.inspect.summary import summary_inputs
from lumiere.cli.options import CheckpointName, Device, RunOption, RunsDir, open_model
from lumiere.errors import LumiereError
from lumiere.report.figures.figure import check_output, write_output

if TYPE_CHECKING:
    from lumiere.report.report_page import Text

NUM_WINDOWS = 256
"""Validation windows for the ablation and the neurons."""
SHOWN_WINDOWS = 2
REPEATED_TOKENS = 12
"""Random tokens in the repeated text that is shown: it shows best what an induction head does."""

Prompts = Annotated[list[str] | None, Option("--prompt", "-p", metavar="TEXT", help="Text to explore. Repeatable.")]
Page = Annotated[Path, Option("--output", "-o", metavar="FILE", help="Page to write or replace: .html.")]


def report(
    prompt: Prompts = None,
    output: Page = Path("report.html"),
    seed: Seed = 0,
    run: RunOption = "latest",
    checkpoint: CheckpointName = "best",
    device: Device = "cpu",
    runs_dir: RunsDir = None,
) -> None:
    """Everything about the model on one self-contained HTML page, which works offline.

    Click a token to see what each head attends to from it, what each layer would predict next, and which part pushed
    which prediction. Without --prompt, it shows two texts of the validation split and repeated random tokens.
    """
    if output.suffix.lower() != ".html":
        raise LumiereError(f"{str(output)!r} is not an .html file", "give a name that ends in .html")
    check_output(output)
    from lumiere.device import keep_freed_memory
    from lumiere.persistence.metrics import read_history
    from lumiere.report.report_page import Text, build_page, inspect_model

    keep_freed_memory()
    opened = open_model(run, checkpoint, device, runs_dir)
    target = InspectTarget(opened, {"random": None}, seed)
    texts = [Text(target.prompt_tokens(text), "prompt") for text in prompt or ()] or chosen_texts(target)
    batches, token_counts, source = summary_inputs(target, NUM_WINDOWS)
    inspection = inspect_model(
        opened.model,
        texts,
        target.scored_sequences()[0],
        batches,
        target.spread_windows_if_any() if batches else None,
        token_counts,
        opened.tokenizer.text_ids,
        target.occurring_tokens,
    )
    provenance = model_provenance(opened) | {"source": source, "averaged_over": target.averaged_over, "seed": seed}
    history = read_history(opened.run.metrics_path, max_points=200)
    page = build_page(inspection, opened.config, history, opened.tokenizer.label, provenance).encode()
    write_output(output, page)
    stdout().print(f"written to {output}, {len(page) / 1e6:.1f} MB: open it in a browser", markup=False)
    if failed := [name for name, result in inspection.results() if not result.holds]:
        stderr().print(f"failed: the receipts of {'; '.join(failed)}", style="bold red", markup=False)
        raise Exit(CHECK_FAILED)


def chosen_texts(target: InspectTarget) -> "list[Text]":
    """Return starts of validation windows, spread over the split, and repeated random tokens."""
    from lumiere.report.report_page import Text

    texts = []
    try:
        count = len(target.validation_windows())
        for number in [count * part // SHOWN_WINDOWS for part in range(SHOWN_WINDOWS)]:
            tokens = target.validation_window(number)[:DEFAULT_TOKENS]
            if len(tokens) > 1:
                texts.append(Text(tokens, f"window {number} of the validation split"))
    except LumiereError as error:
        show_note(f"{error.message}: only random tokens are shown; --prompt gives a text")
    rows, origin = target.repeated_sequences(None, 1, at_most=REPEATED_TOKENS)
    return [*texts, Text(rows[0], f"{len(rows[0]) // 2} random tokens {origin}, twice")]
