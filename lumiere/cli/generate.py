"""`lumiere generate`."""

import sys
from typing import Annotated, Optional

import typer

from lumiere.cli.loading import open_model
from lumiere.cli.options import CheckpointName, Device, RunOption, RunsDir
from lumiere.errors import printable

JOINERS = "\u200c\u200d"  # they have no shape, and belong to words and to emoji


def generate(
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--prompt", "-p", metavar="TEXT", help="The beginning. Without it the model begins by itself."),
    ] = None,
    run: RunOption = "latest",
    checkpoint: CheckpointName = "best",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest text, in tokens.")
    ] = 200,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--top-k", help="Draw from the k likeliest tokens."),
    ] = None,
    top_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--top-p", help="Draw from the likeliest tokens that hold this probability."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--seed", min=0, help="The same seed gives the same text."),
    ] = None,
    device: Device = "auto",
    runs_dir: RunsDir = None,
) -> None:
    """Let a model write, and print the text as it comes.

    Example: [bold]lumiere generate --prompt "Once upon a time" --temperature 0.7 --top-k 40[/]
    """
    from lumiere.generation.decoding import generate as generate_text
    from lumiere.generation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    opened = open_model(run, checkpoint, device, runs_dir)
    pieces = generate_text(opened.model, opened.tokenizer, prompt, max_new_tokens, sampling, seed)
    first = next(pieces, "")
    write((prompt or "") + first)
    for piece in pieces:
        write(piece)
        sys.stdout.flush()
    write("\n")


def write(text: str) -> None:
    """`text` as it is to a file or a pipe; a terminal is not to be steered by what a model was taught to write."""
    sys.stdout.write(printable(text, keep="\n\t" + JOINERS) if sys.stdout.isatty() else text)
