"""Two models beside each other in a terminal: first what is different, then where."""

import numpy as np

from lumiere.cli.console import escape, sparkline, stdout
from lumiere.cli.inspect.batches import counted_documents
from lumiere.interpret.model_diff import (
    SAME_TOKENS,
    HeadMatches,
    ModelDiff,
    PredictionDiff,
    WeightChanges,
    stream_names,
)
from lumiere.persistence.loading import OpenedModel

WIDTH = 80
MOST_LAYERS = 10
"""Layers of a matrix that is shown whole; of more, those at the same depth."""
MOST_COLUMNS = 60
CONTEXT_WIDTH = 48


def show(result: ModelDiff, opened: OpenedModel, other: OpenedModel, top_k: int) -> None:
    """A line for each kind of difference, then a table of each."""
    weights = result.weights
    if not weights.other_tensors and not weights.change_norms.any():
        stdout().print("[bold]the same model: no weight differs[/]\n")
        return
    for line in summary(result):
        stdout().print(line, soft_wrap=False)
    for reason in result.not_compared:
        stdout().print(f"[yellow]not compared:[/] {escape(reason)}", soft_wrap=False)
    if opened.run != other.run:
        stdout().print(
            "[dim]two runs: weights, OV and QK are in the coordinates of each, and say something only where both "
            "began with the same weights[/]",
            soft_wrap=False,
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


def summary(result: ModelDiff) -> list[str]:
    """What is different, most important first."""
    weights = result.weights
    lines = loss_lines(result)
    if (found := result.predictions) is not None:
        lines.append(
            f"predictions: KL(A||B) {found.kl_ab.mean():.4f}, KL(B||A) {found.kl_ba.mean():.4f} nats a token; "
            f"the same first choice "
            f"for {found.same_choice.mean():.1%} of {len(found.targets):,} tokens"
        )
    if result.cka is not None:
        lines.append(cka_line(result.cka))
    if result.heads is not None:
        lines.append(heads_line(result.heads))
    if weights.tensors:
        most = int(np.nanargmax(weights.relative_changes)) if np.isfinite(weights.relative_changes).any() else 0
        lines.append(
            f"weights: moved by {np.nanmedian(weights.relative_changes):.1%} of their size in the median tensor, "
            f"most in {weights.tensors[most]} ({weights.relative_changes[most]:.1%})"
        )
    return lines


def loss_lines(result: ModelDiff) -> list[str]:
    a, b = result.losses
    paired = result.loss_difference
    ends = f"A {a:.4f}, B {b:.4f} {result.loss_unit}"
    if paired is None:
        return [f"[bold]{ends}[/], a difference of {b - a:+.4f}"]
    are_windows = result.loss_unit != SAME_TOKENS or paired.num_documents < len(result.tokens)
    units = counted_documents(paired.num_documents, are_windows=are_windows)
    if paired.low <= 0 <= paired.high:
        verdict = "neither is surely better"
    else:
        verdict = "B is better" if b < a else "A is better"
    return [
        f"[bold]{verdict}: {ends}[/]",
        f"B less A {paired.difference:+.4f}, {paired.confidence:.0%} interval {paired.low:+.4f} to {paired.high:+.4f} "
        f"({units})",
    ]


def cka_line(cka: np.ndarray) -> str:
    if cka.shape[0] != cka.shape[1]:
        return f"representations: CKA of the last layers {cka[-1, -1]:.3f}"
    same = np.diagonal(cka)
    if np.isnan(same).all():
        return "representations: none changes from token to token"
    least = int(np.nanargmin(same))
    names = stream_names(len(same) - 1)
    return f"representations: CKA of the same places {same[least]:.3f} ({names[least]}) to {np.nanmax(same):.3f}"


def heads_line(heads: HeadMatches) -> str:
    places = [(heads.heads_a[a], heads.heads_b[b]) for a, b in heads.matches]
    moved = [f"{a}→{b}" for a, b in places if a != b]
    worst = int(heads.match_divergences.argmax())
    stay = f"{len(places) - len(moved)} of {len(places)} matched with the one in their place"
    others = f"; {', '.join(moved[:4])}{' …' if len(moved) > 4 else ''}" if moved else ""
    return (
        f"heads: {stay}{others}; most different pattern: {'→'.join(dict.fromkeys(places[worst]))}, "
        f"{heads.match_divergences[worst]:.3f} of 1"
    )


def show_tokens(result: ModelDiff, found: PredictionDiff, opened: OpenedModel, top_k: int) -> None:
    """Where the loss changed most, the larger change first, with the text before."""
    changes = found.losses_b - found.losses_a
    # Windows overlap, and documents begin alike: what stands in several of them is shown once.
    once = {
        result.tokens[int(found.sequences[number])][: int(found.positions[number]) + 1]: number
        for number in np.argsort(np.abs(changes), kind="stable")
    }
    order = list(once.values())[::-1][:top_k]
    stdout().print("[bold]tokens whose loss changed most[/] (nats: B less A, A, B)")
    for number in order:
        style = "green" if changes[number] < 0 else "red"
        numbers = f"{changes[number]:+7.2f}[/] {found.losses_a[number]:6.2f} {found.losses_b[number]:6.2f}"
        stdout().print(f"  [{style}]{numbers}  {in_context(result, found, number, opened)}")
    largest = int(found.kl_ab.argmax())
    stdout().print(
        f"[dim]KL(A||B) is largest, {found.kl_ab[largest]:.2f}, before[/] "
        f"{in_context(result, found, largest, opened)}\n"
    )


def in_context(result: ModelDiff, found: PredictionDiff, number: int, opened: OpenedModel) -> str:
    """A token in brackets after the end of what comes before it."""
    position = int(found.positions[number])
    ids = result.tokens[int(found.sequences[number])]
    before = "".join(opened.tokenizer.label(token) for token in ids[:position])
    token = opened.tokenizer.label(int(found.targets[number]))
    room = max(0, CONTEXT_WIDTH - len(token))
    before = before if len(before) <= room else "…" + before[len(before) - room + 1 :]
    return f"[dim]{escape(before)}[/][bold]{escape(f'[{token}]')}[/]"


def show_positions(found: PredictionDiff) -> None:
    """KL(A || B) along the window, neighbouring positions in one column where there are too many."""
    count = len(found.position_numbers)
    if count < 2:
        return
    parts = np.array_split(found.kl_ab_by_position, min(count, MOST_COLUMNS))
    first, last = found.position_numbers[[0, -1]]
    curve = sparkline([float(part.mean()) for part in parts])
    low, high = found.kl_ab_by_position.min(), found.kl_ab_by_position.max()
    stdout().print(f"[bold]KL(A||B) by position[/], {first} to {last}: {low:.4f} to {high:.4f}\n  {curve}\n")


def show_cka(cka: np.ndarray) -> None:
    names_a, names_b = (stream_names(count - 1) for count in cka.shape)
    if max(cka.shape) > MOST_LAYERS:
        stdout().print("[bold]CKA at the same depth[/]")
        for place in range(min(cka.shape)):
            stdout().print(f"  {names_a[place]:9} {cka_label(cka[place, place], 3)}")
        stdout().print("[dim]-o FILE has all pairs[/]\n")
        return
    stdout().print("[bold]CKA[/] (rows A, columns B; 1: alike but for rotation and scale)")
    stdout().print(" " * 11 + "".join(f"{'embed' if name == 'embedding' else name:>6}" for name in names_b))
    for name, row in zip(names_a, cka, strict=True):
        stdout().print(f"  {name:9}" + "".join(f"{cka_label(value, 2):>6}" for value in row))
    stdout().print()


def cka_label(value: float, decimals: int) -> str:
    """A dash where nothing changes from token to token, and so there is no CKA."""
    return "-" if np.isnan(value) else f"{value:.{decimals}f}"


def show_heads(heads: HeadMatches, top_k: int) -> None:
    """The matched heads, the most different first."""
    order = np.argsort(-heads.match_divergences, kind="stable")
    stdout().print("[bold]matched heads  A        B        pattern       OV       QK[/]")
    for number in order[:top_k]:
        a, b = heads.matches[number]
        circuits = "".join(f"{share(float(values[number])):>9}" for values in (heads.ov_changes, heads.qk_changes))
        line = f"{heads.heads_a[a]:9}{heads.heads_b[b]:9}{heads.match_divergences[number]:7.3f}{circuits}"
        stdout().print(f"{'':15}{line}")
    left = max(0, len(order) - top_k)
    more = f"; {left} differ less" if left else ""
    sequences = "1 sequence" if heads.num_pattern_sequences == 1 else f"{heads.num_pattern_sequences} sequences"
    stdout().print(
        f"[dim]pattern: divergence, 0 to 1, over {sequences}; OV, QK: relative change{more}[/]\n",
        soft_wrap=False,
    )


def show_weights(weights: WeightChanges, top_k: int) -> None:
    """The tensors that moved most for their size."""
    order = np.argsort(-np.nan_to_num(weights.relative_changes, nan=np.inf), kind="stable")
    if len(order):
        stdout().print(f"[bold]{'weights that moved most':38} relative  Frobenius  spectral[/]")
    for number in order[:top_k]:
        numbers = f"{weights.change_norms[number]:11.3f}{weights.spectral_changes[number]:10.3f}"
        stdout().print(f"  {weights.tensors[number]:36} {share(float(weights.relative_changes[number])):>8}{numbers}")
    if weights.other_tensors:
        names = ", ".join(weights.other_tensors[:3]) + (" …" if len(weights.other_tensors) > 3 else "")
        stdout().print(f"[dim]{len(weights.other_tensors)} tensors not compared: {names}[/]", soft_wrap=False)
    stdout().print()


def share(value: float) -> str:
    """A relative change; a dash where it is not known."""
    return "-" if np.isnan(value) else f"{value:.1%}"
