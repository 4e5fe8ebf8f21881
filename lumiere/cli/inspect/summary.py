"""`lumiere inspect summary`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.command import analysis, show_wrapped

if TYPE_CHECKING:
    import numpy as np

    from lumiere.api.analysis import Analysis
    from lumiere.interpret.summary import Check, ModelSummary

PART_NAMES = {
    "token_embedding": ("token embedding", ""),
    "positions": ("positions", ""),
    "attention": ("attention", ""),
    "feedforward": ("feed-forward", ""),
    "norms": ("norms", ""),
    "output_head": ("output head", ""),
}
MAX_PLACES = 6

NumWindows = Annotated[int, Option(metavar="N", min=0, help="Validation windows to run; 0 for the weights alone.")]


@analysis(Inspect.summary, windows=NumWindows)
def summary(found: "Analysis[ModelSummary]") -> None:
    """What is in this model? Parameters, norms, ranks, gains, what each part writes, dead neurons, and warnings."""
    show_summary(found.result, found.target.label, found.target.opened.config.model.positions)


def show_summary(result: "ModelSummary", label: Callable[[int], str], positions: str) -> None:
    show_parameters(result, positions)
    show_table(result, "effective rank", result.effective_ranks, ".1f")
    show_table(result, "root mean square", result.rms, ".3f")
    show_embeddings(result)
    stdout().print(f"[dim]{'gains of the norms':18}{'mean (smallest to largest)':>38}[/]")
    for name, gains in zip(result.gain_names, result.gains, strict=True):
        stdout().print(f"  {gain_name(name):24}{spread(gains):>30}")
    stdout().print()
    if result.writes is not None and result.head_writes is not None:
        show_activity(result, result.writes, result.head_writes)
    show_checks(result.checks, label)
    stdout().print()


def show_parameters(result: "ModelSummary", positions: str) -> None:
    total = sum(result.parameters.values())
    stdout().print(f"[bold]{'parameters':18}{total:12,}[/]")
    for part, count in result.parameters.items():
        name, remark = PART_NAMES[part]
        numbers = f"{count:12,} {count / total:6.1%}"
        if part == "token_embedding" and "output_head" not in result.parameters:
            remark = "also the output head (tied)"
        if part == "positions":
            remark = positions
            numbers = numbers if count else " " * 19
        stdout().print(f"  {name:16}{numbers}" + (f"  [dim]{remark}[/]" if remark else ""))
    stdout().print()


def show_table(result: "ModelSummary", title: str, values: "np.ndarray", form: str) -> None:
    """Print one value of every matrix of the blocks: one line per layer, one column per kind."""
    from lumiere.report.figures.bars import by_layer

    kinds, rows = by_layer(result, values)
    stdout().print(f"[dim]{title:18}{''.join(f'{kind:>8}' for kind in kinds)}[/]")
    for layer, row in enumerate(rows):
        stdout().print(f"  {f'L{layer}':16}{''.join(f'{value:8{form}}' for value in row)}")
    if values is result.effective_ranks:
        limits = by_layer(result, result.shapes.min(axis=1))[1][0]
        stdout().print(f"[dim]  {'at most':16}{''.join(f'{limit:8.0f}' for limit in limits)}[/]")
    stdout().print()


def show_embeddings(result: "ModelSummary") -> None:
    ranks = dict(zip(result.matrices, result.effective_ranks, strict=True))
    stdout().print(f"[dim]{'embeddings':18}{'norm of a row (smallest to largest)':>38}  effective rank[/]")
    stdout().print(
        f"  {'tokens':16}{spread(result.token_norms):>38}{ranks['token_embedding.weight']:16.1f}"
        f"\n  {'':16}{result.token_mean_share:.1%} of a row's square is the mean row's"
    )
    if result.position_norms is not None:
        stdout().print(
            f"  {'positions':16}{spread(result.position_norms):>38}{ranks['position_embedding.weight']:16.1f}"
            f"\n  {'':16}mean cosine of neighbors {result.position_cosine:.3f}"
        )
    stdout().print()


def gain_name(name: str) -> str:
    """Return `L0 attention`, `L0 feed-forward` or `final`."""
    if not name.startswith("blocks."):
        return "final"
    _, layer, part = name.split(".")
    return f"L{layer} {'attention' if part.startswith('attention') else 'feed-forward'}"


def spread(values: "np.ndarray") -> str:
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def show_activity(result: "ModelSummary", writes: "np.ndarray", head_writes: "np.ndarray") -> None:
    """Print how much each part writes, relative to the norm of the residual stream before it."""
    show_wrapped(
        f"norm of what each part writes, relative to the residual stream before it; mean over {result.num_tokens:,} "
        f"tokens of {result.num_windows:,} windows"
    )
    stdout().print(f"[dim]{'':4}{'attention':>10}{'feed-forward':>14}   its heads[/]")
    for layer, (attention, feedforward) in enumerate(writes):
        heads = " ".join(f"{share:.0%}" for share in head_writes[layer])
        show_wrapped(f"{f'L{layer}':4}{attention:10.0%}{feedforward:14.0%}   {heads}")
    stdout().print()


def show_checks(checks: "Sequence[Check]", label: Callable[[int], str]) -> None:
    """Print one line per check, and where it found something."""
    for check in checks:
        verdict, style = ("warning", "yellow") if check.count else ("ok", "green")
        found = f"{check.count:,}" if check.count else "no"
        show_wrapped(f"[{style}]{verdict:8}[/]{found} {escape(check.what)} ({escape(check.threshold)})")
        if check.count:
            places = "; ".join(place_name(place, check, label) for place in check.places[:MAX_PLACES])
            more = f"; and {check.count - MAX_PLACES:,} more" if check.count > MAX_PLACES else ""
            show_wrapped(f"[dim]{'':8}{escape(places)}{more}[/]")


def place_name(place: str, check: "Check", label: Callable[[int], str]) -> str:
    """Return the place; tokens as they are printed."""
    if not check.what.startswith("tokens"):
        return place
    return " as ".join(f"{label(int(token))} ({token.strip()})" for token in place.split(","))
