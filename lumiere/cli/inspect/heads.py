"""`lumiere inspect heads`."""

from typing import TYPE_CHECKING, Annotated

import typer

from lumiere.cli.console import escape, show_note, stdout
from lumiere.cli.inspect.analysis import Analysis, Subject, analysis
from lumiere.cli.inspect.options import Heads, Layers, parse_indices
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lumiere.interpret.head_scores import HeadScores

MOST_HEADS = 4
"""Heads that are named for their induction on text; -o FILE has all."""

Threshold = Annotated[
    float, typer.Option("--threshold", metavar="SHARE", min=0, max=1, help="The score above which a head has a role.")
]


@analysis(text=True)
def heads(
    subject: Subject, layer: Layers = None, head: Heads = None, threshold: Threshold = 0.4
) -> "Analysis[HeadScores]":
    """What is each head for? Previous token, the token itself, the first one, duplicates, induction, copying.

    A score is the share of its attention that a head gives to exactly that source, beside what a head that looks at
    all tokens alike would give. Without a text it is measured on 32 sequences of random tokens that come twice;
    --random sets how many tokens, and --prompt, --file or --val take a text instead.
    """
    import torch

    from lumiere.cli.inspect.texts import averaged_tokens, repeated_sequences
    from lumiere.interpret.head_scores import SEQUENCES, score_heads
    from lumiere.report.figures.bars import draw_heads

    shape = subject.opened.config.model
    layers = parse_indices(layer, shape.num_layers, "layer")
    chosen = parse_indices(head, shape.num_heads, "head")
    source = None
    if any(value is not None for name, value in subject.text.items() if name != "random"):
        tokens_NT = torch.tensor([subject.tokens])
    else:
        sequences, origin = repeated_sequences(subject.opened, subject.text["random"], SEQUENCES, subject.seed)
        tokens_NT = torch.tensor(sequences)
        length = tokens_NT.shape[1] // 2
        source = f"{SEQUENCES} sequences of {length} random tokens {origin}, twice (seed {subject.seed})"
    windows = validation_windows(subject)
    averaged, about = averaged_tokens(subject.opened)

    return Analysis(
        compute=lambda model: score_heads(model, tokens_NT, windows, averaged, layers, chosen, threshold),
        show=lambda result: show(result, about),
        draw=draw_heads,
        source=source,
        about={"averaged_over": about},
    )


def validation_windows(subject: Subject) -> "tuple[Tensor, np.ndarray] | None":
    """Windows for the scores on text, and their documents; a note and None without the corpus."""
    from lumiere.cli.inspect.texts import spread_windows

    try:
        return spread_windows(subject.opened)
    except LumiereError as error:
        show_note(f"no in-context-learning score, and no scores on text: {error.message}")
        return None


def show(result: "HeadScores", averaged_over: str) -> None:
    import numpy as np

    names = result.score_names
    stdout().print(f"[bold]head     {'  '.join(f'{name:>9}' for name in names)}  copying[/]")
    for row, column in np.ndindex(len(result.layers), len(result.heads)):
        roles, copying = result.roles[row][column], result.copying[row, column]
        cells = (share(result.scores[row, column, number]) for number in range(len(names)))
        shown = (f"[bold]{cell}[/]" if name in roles else cell for name, cell in zip(names, cells, strict=True))
        label = f"L{result.layers[row]}H{result.heads[column]}"
        copies = "-" if np.isnan(copying) else f"{copying:+.2f}"
        stdout().print(f"{label:8} {'  '.join(shown)}  {copies:>7}")
    stdout().print(f"[dim]{'uniform':8} {'  '.join(share(value) for value in result.uniform)}  {0:>7}[/]\n")
    show_roles(result)
    stdout().print(f"[dim]copying is over {averaged_over}[/]\n", soft_wrap=False)
    show_text_repeats(result)
    show_losses(result)


def share(value: float) -> str:
    """A score in nine characters; a dash where nothing was to be found."""
    return f"{'-' if value != value else f'{value:.1%}':>9}"


def spread(error: "np.ndarray") -> str:
    """A standard error; nothing where a single observation has none."""
    return "" if error != error else f" ± {error:.3f}"


def show_roles(result: "HeadScores") -> None:
    """The heads of each role, the best first, with the score's standard error."""
    import numpy as np

    from lumiere.interpret.head_scores import FEWEST, NUM_ERRORS

    for number, name in enumerate(result.score_names):
        places = [
            (float(result.scores[row, column, number]), row, column)
            for row, column in np.ndindex(len(result.layers), len(result.heads))
            if name in result.roles[row][column]
        ]
        found = [
            f"L{result.layers[row]}H{result.heads[column]} ({score:.0%} ± {result.errors[row, column, number]:.0%})"
            for score, row, column in sorted(places, key=lambda place: (-place[0], *place[1:]))
        ]
        if found:
            stdout().print(f"{escape(name)} heads: {', '.join(found)}", soft_wrap=False)
    if not any(roles for layer in result.roles for roles in layer):
        stdout().print("no head has a role")
    stdout().print(
        f"[dim]a role is a score of {result.threshold:.0%} or more over {FEWEST} tokens or more, above uniform by "
        f"{result.margin * 100:.0f} points and by {NUM_ERRORS} standard errors[/]",
        soft_wrap=False,
    )
    for name, count in zip(result.score_names, result.num_overlaps.tolist(), strict=True):
        if count:
            tokens = "1 token has" if count == 1 else f"{count:,} tokens have"
            note = f"{tokens} a source of {name} at t - 1, where previous-token heads look too; it is left out"
            stdout().print(f"[dim]{note}[/]", soft_wrap=False)
    stdout().print()


def show_text_repeats(result: "HeadScores") -> None:
    """The induction scores at repeated names of the validation split, the best heads first."""
    import numpy as np

    if not result.text_repeats or result.text_scores is None or result.text_uniform is None:
        return
    number = result.score_names.index("induction")
    scores = result.text_scores[..., number]
    best = np.argsort(-scores, axis=None, kind="stable")[:MOST_HEADS]
    heads = ", ".join(
        f"L{result.layers[row]}H{result.heads[column]} {scores[row, column]:.1%}"
        for row, column in zip(*np.unravel_index(best, scores.shape), strict=True)
    )
    stdout().print(
        f"induction on repeated names of the validation split ({result.text_repeats:,} in "
        f"{result.text_documents:,} documents): {heads} (uniform {result.text_uniform[number]:.1%}); "
        f"their loss falls by {result.text_gap:.3f} ± {result.text_gap_error:.3f} nats\n",
        soft_wrap=False,
    )


def show_losses(result: "HeadScores") -> None:
    """What the model gains by looking back: on the repeated tokens, and along real text."""
    import numpy as np

    from lumiere.cli.inspect.batches import counted_documents

    if not np.isnan(result.repeat_gap):
        length = len(result.losses) // 2
        first, second = result.losses[1:length].mean(), result.losses[length + 1 :].mean()
        stdout().print(
            f"repeat gap {result.repeat_gap:.3f}{spread(result.repeat_gap_error)} nats: tokens 2 to {length} have a "
            f"loss of {first:.3f} in the first copy and {second:.3f} in the second",
            soft_wrap=False,
        )
    if result.in_context_bands is not None:
        early, late = ("{} to {}".format(*band) for band in result.in_context_bands)
        units = counted_documents(result.in_context_documents, are_windows=True)
        before, after = result.in_context_losses
        stdout().print(
            f"in-context-learning score {result.in_context_score:+.3f}{spread(result.in_context_error)} nats: "
            f"loss {after:.3f} at positions {late} minus {before:.3f} at positions {early} of "
            f"{result.in_context_windows:,} validation windows ({units})",
            soft_wrap=False,
        )
    elif result.text_repeats is not None:
        stdout().print("no in-context-learning score: no validation window is full and has two positions")
