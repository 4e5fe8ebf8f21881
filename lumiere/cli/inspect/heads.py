"""`lumiere inspect heads`."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.api.target import counted_documents
from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.command import Heads, Layers, analysis, show_wrapped

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.interpret.head_scores import HeadScores

MAX_TEXT_HEADS = 4
"""Heads that are named for their induction on text; -o FILE has all."""

Threshold = Annotated[float, Option(metavar="SHARE", min=0, max=1, help="Minimum score of a head with a role.")]


@analysis(Inspect.heads, layer=Layers, head=Heads, threshold=Threshold)
def heads(found: "Analysis[HeadScores]") -> None:
    """What is each head for? Previous token, current token, first token, duplicate token, induction, copying.

    A score is the share of a head's attention that goes to exactly that source, beside the share of uniform attention.
    Without a text, it is measured on 32 sequences of random tokens that are repeated once; --random sets the number of
    tokens, and --prompt, --file or --val take a text instead.
    """
    show_scores(found.result, found.provenance["averaged_over"])


def show_scores(result: "HeadScores", averaged_over: str) -> None:
    """Print a table of the heads, their roles, and what the model gains from its context."""
    names = result.score_names
    stdout().print(f"[bold]head     {'  '.join(f'{name:>9}' for name in names)}  copying[/]")
    for row, column, name in result.places():
        roles, copying = result.roles[row][column], result.copying[row, column]
        cells = zip(names, map(share, result.scores[row, column]), strict=True)
        shown = "  ".join(f"[bold]{cell}[/]" if score in roles else cell for score, cell in cells)
        copies = "-" if copying != copying else f"{copying:+.2f}"
        stdout().print(f"{name:8} {shown}  {copies:>7}")
    stdout().print(f"[dim]{'uniform':8} {'  '.join(map(share, result.uniform))}  {0:>7}[/]\n")
    show_roles(result)
    show_wrapped(f"[dim]copying is over {averaged_over}[/]\n")
    show_text_repeats(result)
    show_losses(result)


def share(value: float) -> str:
    """Return a score in nine characters; a dash if no token had such a source."""
    return f"{'-' if value != value else f'{value:.1%}':>9}"


def spread(error: float) -> str:
    """Return a standard error; nothing for a single observation, which has none."""
    return "" if error != error else f" ± {error:.3f}"


def show_roles(result: "HeadScores") -> None:
    """Print the heads of each role, the highest score first, with standard errors."""
    from lumiere.interpret.head_scores import FEWEST, NUM_ERRORS

    for number, name in enumerate(result.score_names):
        found = [
            (-float(result.scores[row, column, number]), row, column, head)
            for row, column, head in result.places()
            if name in result.roles[row][column]
        ]
        if found:
            heads = (
                f"{head} ({-score:.0%} ± {result.errors[row, column, number]:.0%})"
                for score, row, column, head in sorted(found)
            )
            show_wrapped(f"{escape(name)} heads: {', '.join(heads)}")
    if not any(roles for layer in result.roles for roles in layer):
        stdout().print("no head has a role")
    show_wrapped(
        f"[dim]a role is a score of {result.threshold:.0%} or more over {FEWEST} tokens or more, above uniform by "
        f"{result.margin * 100:.0f} points and by {NUM_ERRORS} standard errors[/]"
    )
    for name, count in zip(result.score_names, result.num_overlaps.tolist(), strict=True):
        if count:
            tokens = "1 token has" if count == 1 else f"{count:,} tokens have"
            note = f"{tokens} a source of {name} at t - 1, where previous-token heads attend too; it is left out"
            show_wrapped(f"[dim]{note}[/]")
    stdout().print()


def show_text_repeats(result: "HeadScores") -> None:
    """Print the highest induction scores at repeated names of the validation split."""
    if not result.text_repeats or result.text_scores is None or result.text_uniform is None:
        return
    number = result.score_names.index("induction")
    scores = [(-float(result.text_scores[row, column, number]), name) for row, column, name in result.places()]
    best = sorted(scores, key=lambda scored: scored[0])[:MAX_TEXT_HEADS]
    show_wrapped(
        f"induction on repeated names of the validation split ({result.text_repeats:,} in "
        f"{result.text_documents:,} documents): {', '.join(f'{name} {-score:.1%}' for score, name in best)} "
        f"(uniform {result.text_uniform[number]:.1%}); "
        f"their loss falls by {result.text_gap:.3f} ± {result.text_gap_error:.3f} nats\n"
    )


def show_losses(result: "HeadScores") -> None:
    """Print what the model gains from its context, on repeated random tokens and on text."""
    if result.repeat_gap == result.repeat_gap:
        length = len(result.losses) // 2
        first, second = result.losses[1:length].mean(), result.losses[length + 1 :].mean()
        show_wrapped(
            f"repeat gap {result.repeat_gap:.3f}{spread(float(result.repeat_gap_error))} nats: tokens 2 to {length} "
            f"have a loss of {first:.3f} in the first copy and {second:.3f} in the second"
        )
    if result.in_context_bands is not None:
        early, late = ("{} to {}".format(*band) for band in result.in_context_bands)
        units = counted_documents(result.in_context_documents, are_windows=True)
        before, after = result.in_context_losses
        show_wrapped(
            f"in-context-learning score {result.in_context_score:+.3f}{spread(float(result.in_context_error))} nats: "
            f"loss {after:.3f} at positions {late} minus {before:.3f} at positions {early} of "
            f"{result.in_context_windows:,} validation windows ({units})"
        )
    elif result.text_repeats is not None:
        stdout().print("no in-context-learning score: no validation window is full and has two positions")
