"""`lumiere inspect patch`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import escape, show_note, stdout
from lumiere.cli.inspect.command import (
    CONTRAST_OPTIONS,
    Layers,
    MetricName,
    Positions,
    TopK,
    analysis,
    show_wrapped,
    signed_bar,
)

if TYPE_CHECKING:
    import numpy as np

    from lumiere.api.analysis import Analysis
    from lumiere.api.target import InspectTarget
    from lumiere.interpret.patching import Patching

BAR_WIDTH, CELL, LABEL = 30, 5, 12
LEAST = 0.005
"""Share of the difference below which a cell is printed as a dot."""

SiteName = Annotated[
    str,
    Option(
        "--site",
        metavar="SITE",
        help="What to patch: resid_pre, resid_mid, resid_post, attn_out, mlp_out, q, k, v, z, pattern or neurons.",
    ),
]
By = Annotated[
    str | None,
    Option(
        "--by",
        metavar="PART",
        help="What to patch together: layer, position, unit (a head or neuron) or both (a unit at a position). "
        "\\[default: unit for q, k, v, z, pattern and neurons, otherwise position]",
    ),
]
Kind = Annotated[
    str,
    Option(
        "--kind",
        metavar="KIND",
        help="denoising: clean activations into the corrupt run; noising: the reverse; tracing: clean activations into "
        "a run with noise on the tokens that differ.",
    ),
]
Units = Annotated[str | None, Option("--unit", metavar="LIST", help="Heads or neurons, from 0. \\[default: all]")]
Read = Annotated[int, Option("--read", metavar="POS", help="Position whose prediction is measured; -1 is the last.")]
Attribution = Annotated[
    bool, Option("--attribution", help="Estimate the same from gradients, and correlate both (attribution patching).")
]


@analysis(
    Inspect.patch,
    **CONTRAST_OPTIONS,
    metric=MetricName,
    site=SiteName,
    by=By,
    kind=Kind,
    layer=Layers,
    unit=Units,
    pos=Positions,
    read=Read,
    attribution=Attribution,
)
def patch(found: "Analysis[Patching]", top_k: TopK = 16) -> None:
    """Which activations carry the difference between two prompts? Activation patching.

    Both prompts must have the same number of tokens. The effect of a cell is the share of the difference that comes
    along with it: 100 is all of it.
    """
    show_patching(found.result, found.target, top_k)


def show_patching(result: "Patching", target: "InspectTarget", top_k: int) -> None:
    """Print what is compared, then a map, or the largest cells where there are too many for one."""
    show_setting(result, target)
    shape = result.effects.shape
    if result.units and (result.positions or (shape[1] * CELL + LABEL > stdout().width)):
        show_largest(result, target, top_k)
    elif result.units:
        stdout().print(f"[dim]{'':{LABEL}}{''.join(f'{result.unit}{unit}'.rjust(CELL) for unit in result.units)}[/]")
        for layer, effects in zip(result.layers, result.effects[..., 0], strict=True):
            show_line(f"L{layer}", effects)
    elif result.positions:
        show_positions(result, target, top_k)
    else:
        for layer, (effect,) in zip(result.layers, result.effects[..., 0], strict=True):
            show_line(f"L{layer}", [effect])
    stdout().print(f"\n[dim]percent of the difference; · is less than {LEAST:.1%}[/]")
    show_intervals(result)
    if result.estimates is not None:
        show_wrapped(
            f"attribution patching, with the gradient at the {result.gradient_at} run: correlation with the effects "
            f"{result.pearson:.3f} (Pearson), {result.spearman:.3f} (Spearman)"
        )


def show_setting(result: "Patching", target: "InspectTarget") -> None:
    """Print the prompts of a single pair, the tokens, and the metric of both runs."""
    clean, corrupt = float(result.clean.mean()), float(result.corrupt.mean())
    if len(result.tokens) == 1:
        ids = zip(result.tokens[0].tolist(), result.corrupt_tokens[0].tolist(), strict=True)
        places = [(at, a, b) for at, (a, b) in enumerate(ids) if a != b]
        words = ", ".join(f"{target.label(a)} became {target.label(b)} at position {at}" for at, a, b in places)
        show_wrapped(escape(f"corrupt: {words}"))
    named = "" if not len(result.targets) or len(set(result.targets)) > 1 else f" of {target.label(result.targets[0])}"
    if named and len(result.versus) and len(set(result.versus)) == 1 and result.metric == "logit-difference":
        named += f" over {target.label(result.versus[0])}"
    noise = f" ({result.draws} draws of noise)" if result.draws > 1 else ""
    show_wrapped(
        escape(
            f"{result.metric}{named} at position {result.read_positions[0]}: clean {clean:.3f}, corrupt {corrupt:.3f}"
            f"{noise}; {result.kind} of {result.site}\n"
        )
    )


def cell(effect: float) -> str:
    """Return a share as markup, `CELL` wide: positive in cyan, negative in red, large ones bold."""
    if abs(effect) < LEAST:
        return f"[dim]{'·':>{CELL}}[/]"
    style = ("bold " if abs(effect) >= 0.5 else "") + ("cyan" if effect > 0 else "red")
    number = f"{100 * effect:.0f}" if abs(effect) < 100 else "many"
    return f"[{style}]{number:>{CELL}}[/]"


def show_line(label: str, effects: "np.ndarray | list[float]", width: int = LABEL) -> None:
    stdout().print(f"{escape(label[:width].ljust(width))}{''.join(cell(float(effect)) for effect in effects)}")


def show_positions(result: "Patching", target: "InspectTarget", top_k: int) -> None:
    """Print a map of positions and layers; of more layers than fit, the largest cells."""
    width = LABEL + CELL
    room = (stdout().width - width) // CELL
    if len(result.layers) > room:
        show_largest(result, target, top_k)
        return
    effects_LP = result.effects[:, 0]
    stdout().print(f"[dim]{'':{width}}{''.join(f'L{layer}'.rjust(CELL) for layer in result.layers)}[/]")
    hidden = 0
    for column, position in enumerate(result.positions):
        if (abs(effects_LP[:, column]) < LEAST).all():
            hidden += 1
            continue
        tokens = set(result.tokens[:, position].tolist())
        label = target.label(min(tokens)) if len(tokens) == 1 else "(several)"
        show_line(f"{position:>3} {label}", effects_LP[:, column], width)
    if hidden:
        show_note(f"{hidden} of {len(result.positions)} positions carry less than {LEAST:.1%} in every layer")


def show_largest(result: "Patching", target: "InspectTarget", top_k: int) -> None:
    """Print the cells with the largest effects, each with a bar."""
    import numpy as np

    order = np.argsort(-abs(result.effects), axis=None, kind="stable")[:top_k]
    largest = max(abs(float(result.effects.flat[number])) for number in order) or 1.0
    rows = []
    for number in order:
        row, column, place = (int(x) for x in np.unravel_index(number, result.effects.shape))
        layer = result.layers[row]
        name = result.unit_label(layer, result.units[column]) if result.units else f"L{layer}"
        if result.positions:
            position = result.positions[place]
            token = target.label(int(result.tokens[0, position])) if len(result.tokens) == 1 else ""
            name += f" at {position} {token}"
        rows.append((name, float(result.effects[row, column, place])))
    width = max(len(name) for name, _ in rows)
    for name, effect in rows:
        bar = signed_bar(effect, largest, BAR_WIDTH)
        stdout().print(f"{escape(name.ljust(width))} {100 * effect:+6.1f}{bar and f'  {bar}'}")
    if result.effects.size > len(rows):
        show_note(f"{result.effects.size - len(rows):,} more: --top-k shows more, -o FILE saves all")


def show_intervals(result: "Patching") -> None:
    """Print how many cells differ from 0, or why there are no intervals."""
    import numpy as np

    if np.isnan(result.low).all():
        stdout().print("[dim]fewer than 8 pairs: no intervals[/]")
        return
    clear = int(((result.low > 0) | (result.high < 0)).sum())
    units = f"{result.draws} draws of noise" if result.draws > 1 else f"{len(set(result.groups)):,} groups of prompts"
    show_wrapped(
        f"{clear:,} of {result.effects.size:,} cells have a 95 % interval without 0 (bootstrap of {units}), each alone"
    )
