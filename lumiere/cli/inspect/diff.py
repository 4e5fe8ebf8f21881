"""`lumiere inspect diff`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.api.target import counted_documents
from lumiere.cli.console import escape, sparkline, stdout
from lumiere.cli.inspect.command import NumBatches, TopK, analysis, show_wrapped
from lumiere.persistence.loading import OpenedModel

if TYPE_CHECKING:
    import numpy as np

    from lumiere.api.analysis import Analysis
    from lumiere.interpret.model_diff import HeadMatches, ModelDiff, PredictionDiff, WeightChanges

MAX_LAYERS = 10
"""Layers up to which the whole CKA matrix is printed; of more, only its diagonal."""
MAX_COLUMNS = 60
CONTEXT_WIDTH = 48

AcrossLayers = Annotated[bool, Option("--across-layers", help="Match heads across layers.")]
BatchSize = Annotated[int, Option(metavar="N", min=1, help="Sequences in a batch.")]


@analysis(Inspect.diff, across_layers=AcrossLayers, batches=NumBatches, batch_size=BatchSize)
def diff(found: "Analysis[ModelDiff]", top_k: TopK = 5) -> None:
    """What differs between two runs, or two checkpoints of one? Predictions, layers, heads and weights.

    Without a text option, over windows of the validation split of A. If the tokenizers differ, only bits per byte and
    weights are compared.
    """
    opened, other = found.target.opened, found.target.other
    assert other is not None  # a comparison has two
    show_diff(found.result, opened, other, top_k)


def show_diff(result: "ModelDiff", opened: OpenedModel, other: OpenedModel, top_k: int) -> None:
    """Print a line for each kind of difference, then a table of each."""
    weights = result.weights
    if not weights.other_tensors and not weights.change_norms.any():
        stdout().print("[bold]the same model: no weight differs[/]\n")
        return
    for line in summary_lines(result):
        show_wrapped(line)
    for reason in result.not_compared:
        show_wrapped(f"[yellow]not compared:[/] {escape(reason)}")
    if opened.run != other.run:
        show_wrapped(
            "[dim]two runs: weights, OV and QK are in the coordinates of each model and comparable only if both began "
            "with the same weights[/]"
        )
    stdout().print()
    if result.predictions is not None:
        show_tokens(result, result.predictions, opened, top_k)
        show_positions(result.predictions)
    if result.cka is not None:
        show_cka(result.cka)
    if result.heads is not None:
        show_heads(result.heads, top_k)
    show_weights(result.weights, top_k)


def summary_lines(result: "ModelDiff") -> Iterator[str]:
    """Yield the differences, most important first."""
    import numpy as np

    from lumiere.interpret.model_diff import SAME_TOKENS, stream_names

    a, b = result.losses
    ends, paired = f"A {a:.4f}, B {b:.4f} {result.loss_unit}", result.loss_difference
    if paired is None:
        yield f"[bold]{ends}[/], a difference of {b - a:+.4f}"
    else:
        are_windows = result.loss_unit != SAME_TOKENS or paired.num_documents < len(result.tokens)
        units = counted_documents(paired.num_documents, are_windows=are_windows)
        is_clear = paired.low > 0 or paired.high < 0
        better = f"{'B' if b < a else 'A'} is" if is_clear else "neither is significantly"
        yield f"[bold]{better} better: {ends}[/]"
        interval = f"{paired.confidence:.0%} interval {paired.low:+.4f} to {paired.high:+.4f}"
        yield f"B minus A {paired.difference:+.4f}, {interval} ({units})"
    if (found := result.predictions) is not None:
        yield (
            f"predictions: KL(A||B) {found.kl_ab.mean():.4f}, KL(B||A) {found.kl_ba.mean():.4f} nats per token; "
            f"same top token for {found.same_choice.mean():.1%} of {len(found.targets):,} tokens"
        )
    if (cka := result.cka) is not None:
        same = np.diagonal(cka)
        if cka.shape[0] != cka.shape[1]:
            yield f"representations: CKA of the last layers {cka[-1, -1]:.3f}"
        elif np.isnan(same).all():
            yield "representations: none changes from token to token"
        else:
            least = f"{np.nanmin(same):.3f} ({stream_names(len(same) - 1)[int(np.nanargmin(same))]})"
            yield f"representations: CKA of the same stages {least} to {np.nanmax(same):.3f}"
    if (heads := result.heads) is not None:
        places = [(heads.heads_a[a], heads.heads_b[b]) for a, b in heads.matches]
        moved = [f"{a}→{b}" for a, b in places if a != b]
        others = f"; {', '.join(moved[:4])}{' …' if len(moved) > 4 else ''}" if moved else ""
        worst = int(heads.match_divergences.argmax())
        pair = "→".join(dict.fromkeys(places[worst]))
        yield (
            f"heads: {len(places) - len(moved)} of {len(places)} matched with the head in the same place{others}; "
            f"most different pattern: {pair}, {heads.match_divergences[worst]:.3f} of 1"
        )
    if (weights := result.weights).tensors:
        most = int(np.nanargmax(weights.relative_changes)) if np.isfinite(weights.relative_changes).any() else 0
        yield (
            f"weights: changed by {np.nanmedian(weights.relative_changes):.1%} of their norm in the median tensor, "
            f"most in {weights.tensors[most]} ({weights.relative_changes[most]:.1%})"
        )


def show_tokens(result: "ModelDiff", found: "PredictionDiff", opened: OpenedModel, top_k: int) -> None:
    """Print the tokens whose loss changed most, with the text before them."""
    changes = found.losses_b - found.losses_a
    # Windows overlap and documents begin alike: a context in several of them is printed once.
    once = {
        result.tokens[int(found.sequences[number])][: int(found.positions[number]) + 1]: number
        for number in abs(changes).argsort(kind="stable")
    }
    stdout().print("[bold]tokens whose loss changed most[/] (nats: B minus A, A, B)")
    for number in list(once.values())[::-1][:top_k]:
        style = "green" if changes[number] < 0 else "red"
        numbers = f"{changes[number]:+7.2f}[/] {found.losses_a[number]:6.2f} {found.losses_b[number]:6.2f}"
        stdout().print(f"  [{style}]{numbers}  {in_context(result, found, number, opened)}")
    largest = int(found.kl_ab.argmax())
    stdout().print(
        f"[dim]KL(A||B) is largest, {found.kl_ab[largest]:.2f}, before[/] "
        f"{in_context(result, found, largest, opened)}\n"
    )


def in_context(result: "ModelDiff", found: "PredictionDiff", number: int, opened: OpenedModel) -> str:
    """Return a token in brackets after the end of its context."""
    label = opened.tokenizer.label
    ids = result.tokens[int(found.sequences[number])]
    before = "".join(label(token) for token in ids[: int(found.positions[number])])
    token = label(int(found.targets[number]))
    room = max(0, CONTEXT_WIDTH - len(token))
    before = before if len(before) <= room else "…" + before[len(before) - room + 1 :]
    return f"[dim]{escape(before)}[/][bold]{escape(f'[{token}]')}[/]"


def show_positions(found: "PredictionDiff") -> None:
    """Print KL(A || B) by position, neighboring positions in one column if there are too many."""
    import numpy as np

    count = len(found.position_numbers)
    if count < 2:
        return
    parts = np.array_split(found.kl_ab_by_position, min(count, MAX_COLUMNS))
    first, last = found.position_numbers[[0, -1]]
    curve = sparkline([float(part.mean()) for part in parts])
    low, high = found.kl_ab_by_position.min(), found.kl_ab_by_position.max()
    stdout().print(f"[bold]KL(A||B) by position[/], {first} to {last}: {low:.4f} to {high:.4f}\n  {curve}\n")


def show_cka(cka: "np.ndarray") -> None:
    from lumiere.interpret.model_diff import stream_names

    names_a, names_b = (stream_names(count - 1) for count in cka.shape)
    if max(cka.shape) > MAX_LAYERS:
        stdout().print("[bold]CKA at the same depth[/]")
        for place in range(min(cka.shape)):
            stdout().print(f"  {names_a[place]:9} {known(cka[place, place], '.3f')}")
        stdout().print("[dim]-o FILE has all pairs[/]\n")
        return
    stdout().print("[bold]CKA[/] (rows A, columns B; 1: equal up to rotation and scale)")
    stdout().print(" " * 11 + "".join(f"{'embed' if name == 'embedding' else name:>6}" for name in names_b))
    for name, row in zip(names_a, cka, strict=True):
        stdout().print(f"  {name:9}" + "".join(f"{known(value, '.2f'):>6}" for value in row))
    stdout().print()


def show_heads(heads: "HeadMatches", top_k: int) -> None:
    """Print the matched heads, the most different first."""
    order = (-heads.match_divergences).argsort(kind="stable")
    stdout().print("[bold]matched heads  A        B        pattern       OV       QK[/]")
    for number in order[:top_k]:
        a, b = heads.matches[number]
        circuits = "".join(f"{known(float(values[number])):>9}" for values in (heads.ov_changes, heads.qk_changes))
        names = f"{heads.heads_a[a]:9}{heads.heads_b[b]:9}"
        stdout().print(f"{'':15}{names}{heads.match_divergences[number]:7.3f}{circuits}")
    left = max(0, len(order) - top_k)
    more = f"; {left} differ less" if left else ""
    sequences = "1 sequence" if heads.num_pattern_sequences == 1 else f"{heads.num_pattern_sequences} sequences"
    show_wrapped(f"[dim]pattern: divergence, 0 to 1, over {sequences}; OV, QK: relative change{more}[/]\n")


def show_weights(weights: "WeightChanges", top_k: int) -> None:
    """Print the tensors with the largest relative changes."""
    import numpy as np

    order = np.argsort(-np.nan_to_num(weights.relative_changes, nan=np.inf), kind="stable")
    if len(order):
        stdout().print(f"[bold]{'weights that changed most':38} relative  Frobenius  spectral[/]")
    for number in order[:top_k]:
        numbers = f"{weights.change_norms[number]:11.3f}{weights.spectral_changes[number]:10.3f}"
        stdout().print(f"  {weights.tensors[number]:36} {known(float(weights.relative_changes[number])):>8}{numbers}")
    if weights.other_tensors:
        names = ", ".join(weights.other_tensors[:3]) + (" …" if len(weights.other_tensors) > 3 else "")
        show_wrapped(f"[dim]{len(weights.other_tensors)} tensors not compared: {names}[/]")
    stdout().print()


def known(value: float, form: str = ".1%") -> str:
    """Format a number; a dash for NaN, such as the CKA of a stage that does not change from token to token."""
    return "-" if value != value else format(value, form)
