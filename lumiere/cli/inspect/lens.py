"""`lumiere inspect lens`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.api.lenses import LENSES, STATISTICS, TRAINED
from lumiere.api.target import parse_token
from lumiere.cli.console import color_support, show_note, stdout
from lumiere.cli.inspect.command import Positions, TopK, analysis, show_wrapped

if TYPE_CHECKING:
    from rich.text import Text

    from lumiere.api.analysis import Analysis
    from lumiere.interpret.lenses import LensComparison
    from lumiere.interpret.logit_lens import LogitLens

MIN_CELL, MAX_CELL = 7, 12

Statistic = Annotated[str, Option("--stat", metavar="STAT", help=f"What each cell shows: {', '.join(STATISTICS)}.")]
Sublayers = Annotated[bool, Option("--sublayers", help="Add the stage after each block's attention.")]
Target = Annotated[
    str | None, Option("--target", metavar="TOKEN", help="Token to look for. \\[default: the next token of the text]")
]


Kind = Annotated[str, Option("--lens", metavar="NAME", help=f"The lens: {', '.join(LENSES)}.")]
Train = Annotated[
    str | None,
    Option(
        "--train",
        metavar="NAME",
        help=f"Train this lens ({' or '.join(TRAINED)}) on the training split or --file, and keep it with the run.",
    ),
]
Compare = Annotated[bool, Option("--compare", help="Compare the lenses kept with the run on held-out text.")]
Steps = Annotated[int, Option(metavar="N", min=1, help="Steps of training a tuned lens, at most.")]
Texts = Annotated[
    int | None, Option(metavar="N", min=1, help="Texts to fit to. \\[default: 4096, or 100 for jacobian]")
]


@analysis(
    Inspect.lens,
    stat=Statistic,
    sublayers=Sublayers,
    target=Target,
    pos=Positions,
    top_k=TopK,
    lens=Kind,
    train=Train,
    compare=Compare,
    steps=Steps,
    texts=Texts,
)
def lens(found: "Analysis[LogitLens | LensComparison]", stat: Statistic = "top", target: Target = None) -> None:
    """What would the model predict if it stopped early? The logit lens: rows are tokens, columns layers.

    The first column often repeats the input token, since the unembedding is tied to the embedding. --top-k is for
    --json and -o. --train fits a lens to this checkpoint, which --lens then reads with.
    """
    from lumiere.interpret.lenses import LensComparison

    if isinstance(found.result, LensComparison):
        show_comparison(found.result)
        return
    label = found.target.label
    words = None if target is None else label(parse_token(target, found.target.opened.tokenizer))
    show_lens(found.result, stat, label, words)


def show_comparison(result: "LensComparison") -> None:
    """Print a table for each statistic: a line a stage, a column a lens."""
    from rich.text import Text

    from lumiere.report.figures.heat_maps import stage_name

    width = max(map(len, (*result.lenses, "tuned"))) + 2
    parts = (
        ("KL(final || lens) in nats", result.divergences, ".3f"),
        ("share of tokens with the model's top token on top", result.agreements, ".1%"),
        ("mean number of tokens above the model's top token", result.ranks, ",.1f"),
    )
    for title, values, form in parts:
        stdout().print(title)
        stdout().print(Text(" " * 8 + "".join(f"{name:>{width}}" for name in result.lenses), style="dim"))
        for stage, name in enumerate(result.stages):
            numbers = "".join(f"{value:>{width}{form}}" for value in values[:, stage])
            stdout().print(f"{stage_name(name):>8}{numbers}")
        stdout().print()


def show_lens(result: "LogitLens", stat: str, label: Callable[[int], str], target: str | None) -> None:
    """Print a grid of tokens by stages, then the means of each stage."""
    from rich.text import Text

    from lumiere.cli.terminal_plots import show_legend
    from lumiere.report.figures.figure import LABEL_WIDTH, fitted
    from lumiere.report.figures.heat_maps import lens_cells, stage_name

    names = [stage_name(stage) for stage in result.stages]
    columns, width = choose_columns(names, stdout().width - LABEL_WIDTH - 1)
    meaning = {
        "top": "the most probable token, its probability before it; underlined if it is the next token of the text",
        "probability": f"probability of {target or 'the next token'}",
        "rank": f"how many tokens are more probable than {target or 'the next token'}",
        "entropy": "entropy in nats",
        "kl": "KL(final || here) in nats",
    }[stat]
    show_wrapped(f"{meaning}\n", markup=False)
    if len(columns) < len(result.stages):
        show_note(f"the terminal has room for {len(columns)} of {len(result.stages)} stages")
    headings = "".join(names[stage].ljust(width) for stage in columns)
    stdout().print(Text(" " * (LABEL_WIDTH + 1) + headings.rstrip(), style="dim"))
    texts = lens_cells(result, stat, label)
    for row, position in enumerate(result.positions):
        line = Text(fitted(label(result.tokens[position])).rjust(LABEL_WIDTH) + " ", no_wrap=True)
        for stage in columns:
            if stat == "top":
                cell = top_cell(result, stage, row, width, label)
            else:
                cell = Text(texts[row][stage]) if texts[row][stage] else Text("-", style="dim")
            cell.pad_right(max(0, width - len(cell.plain)))
            line.append_text(cell)
        line.rstrip()
        stdout().print(line)
    stdout().print()
    show_means(result, names, target)
    if stat == "top":
        show_legend("probability")


def choose_columns(names: Sequence[str], width: int) -> tuple[list[int], int]:
    """Return the stages that fit into `width`, evenly spread from the first to the last, and the width of each."""
    narrowest = max(MIN_CELL, *(len(name) + 1 for name in names))
    room = max(width, 2 * narrowest)
    count = min(len(names), room // narrowest)
    columns = [round(number * (len(names) - 1) / (count - 1)) for number in range(count)]
    return columns, min(room // count, MAX_CELL)


def top_cell(result: "LogitLens", stage: int, row: int, width: int, label: Callable[[int], str]) -> "Text":
    """Return the most probable token and its probability: a colored square, a shade, or in a pipe the number."""
    from rich.text import Text

    from lumiere.cli.terminal_plots import color_of, shade_of

    token, probability = int(result.top_tokens[stage, row, 0]), float(result.top_probabilities[stage, row, 0])
    shade, style = shade_of(probability)
    mark, mark_style, word_style = {
        "many": ("█", color_of(probability), ""),
        "few": (shade, style, style),
        "none": (f"{probability:.0%} ", "", ""),
    }[color_support()]
    word, room = label(token), width - 1 - len(mark)
    word = word if len(word) <= room else word[: room - 1] + "…"
    underline = " underline" if token == result.targets[row] else ""
    return Text().append(mark, style=mark_style).append(word, style=word_style + underline)


def show_means(result: "LogitLens", names: Sequence[str], target: str | None) -> None:
    """Print one line per stage: means over the tokens, and how many are decided."""
    import numpy as np
    from rich.text import Text

    from lumiere.report.figures.figure import LABEL_WIDTH, rank_label

    has_target = result.targets >= 0
    stdout().print(Text(f"{'mean':>{LABEL_WIDTH}} entropy      KL  decided     loss  median rank  on top", style="dim"))
    for stage, name in enumerate(names):
        decided = (result.decision_stages <= stage).mean()
        line = f"{name:>{LABEL_WIDTH}} {result.entropies[stage].mean():7.2f} {result.divergences[stage].mean():7.2f}"
        line += f"{decided:9.0%}"
        if has_target.any():
            # A probability that float64 rounds to 0 has no logarithm.
            losses = -np.log(np.maximum(result.target_probabilities[stage][has_target], np.finfo(float).tiny))
            median = rank_label(float(np.median(result.target_places[stage][has_target])))
            line += f"{losses.mean():9.2f} {median:>12} {result.target_on_top[stage][has_target].mean():7.0%}"
        stdout().print(line)
    counts = [(name, int((result.decision_stages == stage).sum())) for stage, name in enumerate(names)]
    show_wrapped(
        f"\nloss, rank and on top are those of {target or 'the next token'}; decided: the top token is the final one "
        f"from here on\ndecision depth: {', '.join(f'{name} {count}' for name, count in counts if count)}",
        markup=False,
    )
