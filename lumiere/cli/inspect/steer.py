"""`lumiere inspect steer`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.command import NumBatches, analysis, show_wrapped

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.interpret.steering import Steering

BatchSize = Annotated[int, Option(metavar="N", min=1, help="Windows in a batch.")]


def texts_option(text: str) -> object:
    return Annotated[Path | None, Option(metavar="FILE", help=text)]


@analysis(
    Inspect.steer,
    positive=texts_option("Texts that have what the direction is for, one a line."),
    negative=texts_option("Texts that lack it, one a line."),
    token=Annotated[
        str | None, Option("--token", metavar="TOKEN", help="Use this token's unembedding, less that of --vs.")
    ],
    direction=texts_option("Use the direction of this file, of --save here or of inspect probe."),
    layer=Annotated[str | None, Option("--layer", "-l", metavar="L", help="Add it after this block, from 0.")],
    target=Annotated[str | None, Option(metavar="TOKEN", help="Measure the log-probability of this token.")],
    vs=Annotated[str | None, Option(metavar="TOKEN", help="Measure the logit of --target minus that of this token.")],
    prompts=texts_option("Prompts, one a line, instead of one text."),
    placebos=Annotated[int, Option(metavar="N", min=2, help="Random directions of each kind.")],
    batches=NumBatches,
    batch_size=BatchSize,
    save=Annotated[
        Path | None, Option(metavar="FILE", help="Write the direction to a .safetensors file, for generate --steer.")
    ],
)
def steer(found: "Analysis[Steering]") -> None:
    """What does a direction of the residual stream write? Effects by dose, beside random directions.

    Without a text or --prompts, the prompts are starts of validation windows.
    """
    show_steering(found.result)


def show_steering(result: "Steering") -> None:
    """Print the effect at each dose, then the slope and its rank among the placebos."""
    show_wrapped(
        f"{escape(result.method)}, after block {result.layer}; its norm is {result.norm:.3g}, that of the stream "
        f"{result.stream_norm:.3g}, the unit of doses.\n"
        f"Change of the {escape(result.metric)} ({result.values.mean():.3f} without steering):\n"
    )
    has_interval, has_losses = result.low[0] == result.low[0], result.losses[0] == result.losses[0]
    interval = "          interval" if has_interval else ""
    losses = f"{'loss':>9}{'random':>9}" if has_losses else ""
    stdout().print(f"[dim]{'dose':>7}{'effect':>9}{interval}   random directions{losses}[/]")
    for row in result.rows():
        line = f"{row['dose']:+7.3f}{row['effect']:+9.3f}"
        if has_interval:
            line += f"  {spanned(row['low'], row['high']):>16}"
        line += f"  {spanned(row['random_low'], row['random_high']):>18}"
        if has_losses:
            line += f"{row['loss']:9.3f}{row['random_loss']:9.3f}"
        stdout().print(line)
    spread = "" if result.slope_low != result.slope_low else f" ({result.slope_low:+.2f} to {result.slope_high:+.2f})"
    stdout().print(
        f"\nslope at dose 0: {result.slope:+.2f}{spread} per unit; {result.wrong_sign:.0%} of prompts go the other way"
    )
    for kind, rank in result.ranks.items():
        count = result.placebo_kinds.count(kind)
        stdout().print(
            f"rank {rank} of {count + 1} by |slope| among {count} {kind} directions (p = {rank / (count + 1):.2f})"
        )
    stdout().print()


def spanned(low: float, high: float) -> str:
    return f"{low:+.3f} to {high:+.3f}"
