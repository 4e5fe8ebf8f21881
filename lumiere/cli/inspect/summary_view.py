"""The summary of a model in a terminal."""

from collections.abc import Sequence

import numpy as np

from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.vocabulary import token_label
from lumiere.data.tokenizer import Tokenizer
from lumiere.interpret.summary import Check, ModelSummary

PART_NAMES = {
    "token_embedding": ("token embedding", "also the output head (tied)"),
    "positions": ("positions", "learned"),
    "attention": ("attention", ""),
    "feedforward": ("feed-forward", ""),
    "norms": ("norms", ""),
}
KINDS = ("query", "key", "value", "output", "gate", "up", "down")
PLACES_SHOWN = 6


def show(result: ModelSummary, tokenizer: Tokenizer) -> None:
    show_parameters(result)
    for title, values in (("effective rank", result.effective_ranks), ("root mean square", result.rms)):
        show_table(result, title, values)
    show_embeddings(result)
    show_gains(result)
    if result.writes is not None and result.head_writes is not None:
        show_activity(result, result.writes, result.head_writes)
    show_checks(result.checks, tokenizer)
    stdout().print()


def show_parameters(result: ModelSummary) -> None:
    total = sum(result.parameters.values())
    stdout().print(f"[bold]{'parameters':18}{total:12,}[/]")
    for part, count in result.parameters.items():
        name, remark = PART_NAMES[part]
        if count or part != "positions":
            stdout().print(f"  {name:16}{count:12,} {count / total:6.1%}" + (f"  [dim]{remark}[/]" if remark else ""))
        else:
            stdout().print(f"  {name:16}{'':12} {'':6}  [dim]rotary[/]")
    stdout().print()


def show_table(result: ModelSummary, title: str, values: np.ndarray) -> None:
    """One value of every matrix of the blocks: a line a layer, a column a kind."""
    by_name = dict(zip(result.matrices, values, strict=True))
    smaller = dict(zip(result.matrices, result.shapes.min(axis=1), strict=True))
    is_rank = "rank" in title
    headings = [f"{kind:>8}" for kind in KINDS]
    stdout().print(f"[dim]{title:18}{''.join(headings)}[/]")
    for layer in range(len(result.gain_names) // 2):
        names = [matrix_name(layer, kind) for kind in KINDS]
        cells = [f"{by_name[name]:8.1f}" if is_rank else f"{by_name[name]:8.3f}" for name in names]
        stdout().print(f"  {f'L{layer}':16}{''.join(cells)}")
    if is_rank:
        limits = "".join(f"{smaller[matrix_name(0, kind)]:8}" for kind in KINDS)
        stdout().print(f"[dim]  {'at most':16}{limits}[/]")
    stdout().print()


def matrix_name(layer: int, kind: str) -> str:
    part = "attention" if kind in ("query", "key", "value", "output") else "feedforward"
    return f"blocks.{layer}.{part}.{kind}.weight"


def show_embeddings(result: ModelSummary) -> None:
    ranks = dict(zip(result.matrices, result.effective_ranks, strict=True))
    stdout().print(f"[dim]{'embeddings':18}{'norm of a row (smallest to largest)':>38}  effective rank[/]")
    token_rank = ranks["token_embedding.weight"]
    stdout().print(
        f"  {'tokens':16}{spread(result.token_norms):>38}{token_rank:16.1f}"
        f"\n  {'':16}{result.token_mean_share:.1%} of a row's square is the mean row's"
    )
    if result.position_norms is not None:
        position_rank = ranks["position_embedding.weight"]
        stdout().print(
            f"  {'positions':16}{spread(result.position_norms):>38}{position_rank:16.1f}"
            f"\n  {'':16}mean cosine of neighbours {result.position_cosine:.3f}"
        )
    stdout().print()


def show_gains(result: ModelSummary) -> None:
    stdout().print(f"[dim]{'gains of the norms':18}{'mean (smallest to largest)':>38}[/]")
    for name, gains in zip(result.gain_names, result.gains, strict=True):
        stdout().print(f"  {gain_name(name):24}{spread(gains):>30}")
    stdout().print()


def gain_name(name: str) -> str:
    """`L0 attention`, `L0 feed-forward`, `final`."""
    if not name.startswith("blocks."):
        return "final"
    _, layer, part = name.split(".")
    return f"L{layer} {'attention' if part.startswith('attention') else 'feed-forward'}"


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def show_activity(result: ModelSummary, writes: np.ndarray, head_writes: np.ndarray) -> None:
    """How much each part writes, as a share of the stream's norm before it."""
    stdout().print(
        f"what is written, as a share of the norm of the stream before it; mean over {result.num_tokens:,} tokens of "
        f"{result.num_windows:,} windows",
        soft_wrap=False,
    )
    stdout().print(f"[dim]{'':4}{'attention':>10}{'feed-forward':>14}   its heads[/]")
    for layer, (attention, feedforward) in enumerate(writes):
        heads = " ".join(f"{share:.0%}" for share in head_writes[layer])
        stdout().print(f"{f'L{layer}':4}{attention:10.0%}{feedforward:14.0%}   {heads}", soft_wrap=False)
    stdout().print()


def show_checks(checks: Sequence[Check], tokenizer: Tokenizer) -> None:
    """What was looked for: a line each, with where it was found."""
    for check in checks:
        verdict, style = ("warning", "yellow") if check.count else ("ok", "green")
        found = f"{check.count:,}" if check.count else "no"
        stdout().print(
            f"[{style}]{verdict:8}[/]{found} {escape(check.what)} ({escape(check.threshold)})", soft_wrap=False
        )
        if check.count:
            places = ["; ".join(named(place, check, tokenizer) for place in check.places[:PLACES_SHOWN])]
            more = check.count - PLACES_SHOWN
            stdout().print(
                f"[dim]{'':8}{escape(places[0])}{f'; and {more:,} more' if more > 0 else ''}[/]", soft_wrap=False
            )


def named(place: str, check: Check, tokenizer: Tokenizer) -> str:
    """The place, with its tokens as they are printed where it is one of tokens."""
    if not check.what.startswith("tokens"):
        return place
    return " as ".join(f"{token_label(tokenizer, int(token))} ({token.strip()})" for token in place.split(","))
