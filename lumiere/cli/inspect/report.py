"""`lumiere inspect report`."""

from pathlib import Path
from typing import Annotated

from typer import Exit, Option

from lumiere.cli.console import CHECK_FAILED, stderr, stdout
from lumiere.cli.inspect.command import Seed, open_runs
from lumiere.cli.options import CheckpointName, Device, MaxTokens, RunOption, RunsDir

Prompts = Annotated[list[str] | None, Option("--prompt", "-p", metavar="TEXT", help="Text to explore. Repeatable.")]
Page = Annotated[Path, Option("--output", "-o", metavar="FILE", help="Page to write or replace: .html.")]


def report(
    prompt: Prompts = None,
    output: Page = Path("report.html"),
    seed: Seed = 0,
    run: RunOption = "latest",
    checkpoint: CheckpointName = "best",
    device: Device = "cpu",
    max_tokens: MaxTokens = None,
    runs_dir: RunsDir = None,
) -> None:
    """Everything about the model on one self-contained HTML page, which works offline.

    Click a token to see what each head attends to from it, what each layer would predict next, and which part pushed
    which prediction. Without --prompt, it shows two texts of the validation split and repeated random tokens.
    """
    from lumiere.api.report import check_page

    check_page(output)
    run_of = {"run": run, "checkpoint": checkpoint, "device": device, "runs_dir": runs_dir, "max_tokens": max_tokens}
    [opened] = open_runs(run_of)
    found = opened.inspect.report(*(prompt or ()), seed=seed)
    found.save(output)
    size = len(found.page.encode()) / 1e6
    stdout().print(f"written to {output}, {size:.1f} MB: open it in a browser", markup=False)
    if found.failed:
        stderr().print(f"failed: the receipts of {'; '.join(found.failed)}", style="bold red", markup=False)
        raise Exit(CHECK_FAILED)
