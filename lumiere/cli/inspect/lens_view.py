"""The logit lens in a terminal: a grid of tokens by stages."""

from collections.abc import Callable, Sequence

import numpy as np
from rich.text import Text

from lumiere.cli.console import color_support, show_note, stdout
from lumiere.cli.terminal_plots import color_of, shade_of, show_legend
from lumiere.interpret.logit_lens import LogitLens
from lumiere.report.figures.figure import LABEL_WIDTH, fitted, rank_label
from lumiere.report.figures.heat_maps import stage_name

NARROWEST_CELL, WIDEST_CELL = 7, 12


def show(result: LogitLens, stat: str, label: Callable[[int], str], target: str | None) -> None:
    """A grid of tokens by stages, then what holds on average at each stage."""
    names = [stage_name(stage) for stage in result.stages]
    columns, width = choose_columns(names, stdout().width)
    meaning = {
        "top": "the most probable token, its probability before it; underlined where the text goes on so",
        "probability": f"probability of {target or 'the next token'}",
        "rank": f"how many tokens are more probable than {target or 'the next token'}",
        "entropy": "entropy in nats",
        "kl": "KL(final || here) in nats",
    }[stat]
    stdout().print(f"{meaning}\n", soft_wrap=False, markup=False)
    if len(columns) < len(result.stages):
        show_note(f"the terminal has room for {len(columns)} of {len(result.stages)} stages")
    headings = "".join(names[stage].ljust(width) for stage in columns)
    stdout().print(Text(" " * (LABEL_WIDTH + 1) + headings.rstrip(), style="dim"))
    for row, position in enumerate(result.positions):
        line = Text(fitted(label(result.tokens[position])).rjust(LABEL_WIDTH) + " ", no_wrap=True)
        for stage in columns:
            line.append_text(cell(result, stat, stage, row, width, label))
        line.rstrip()
        stdout().print(line)
    stdout().print()
    show_means(result, names, target)
    if stat == "top":
        show_legend("probability")


def choose_columns(names: Sequence[str], terminal_width: int) -> tuple[list[int], int]:
    """The stages that the terminal has room for, evenly spread with the first and the last, and the width of each."""
    narrowest = max(NARROWEST_CELL, *(len(name) + 1 for name in names))
    room = max(terminal_width - LABEL_WIDTH - 1, 2 * narrowest)
    count = min(len(names), room // narrowest)
    columns = [round(number * (len(names) - 1) / (count - 1)) for number in range(count)]
    return columns, min(room // count, WIDEST_CELL)


def cell(result: LogitLens, stat: str, stage: int, row: int, width: int, label: Callable[[int], str]) -> Text:
    """One statistic of one token at one stage, padded to `width`."""
    if stat == "top":
        token = int(result.top_tokens[stage, row, 0])
        text, style = probability_mark(float(result.top_probabilities[stage, row, 0]))
        word, room = label(token), width - 1 - len(text.plain)
        word = word if len(word) <= room else word[: room - 1] + "…"
        text.append(word, style=f"{style} underline" if token == result.targets[row] else style)
    elif stat in ("probability", "rank") and result.targets[row] < 0:
        text = Text("-", style="dim")
    else:
        text = Text(
            {
                "probability": lambda: f"{result.target_probabilities[stage, row]:.1%}",
                "rank": lambda: rank_label(result.target_places[stage, row]),
                "entropy": lambda: f"{result.entropies[stage, row]:.2f}",
                "kl": lambda: f"{result.divergences[stage, row]:.2f}",
            }[stat]()
        )
    text.pad_right(max(0, width - len(text.plain)))
    return text


def probability_mark(probability: float) -> tuple[Text, str]:
    """What stands before a token, and the style of the token: a square, a shade, or the number in a pipe."""
    if color_support() == "many":
        return Text().append("█", style=color_of(probability)), ""
    if color_support() == "none":
        return Text(f"{probability:.0%} "), ""
    shade, style = shade_of(probability)
    return Text().append(shade, style=style), style


def show_means(result: LogitLens, names: Sequence[str], target: str | None) -> None:
    """One line a stage: what the mean token sees there, and how many are decided."""
    has_target = result.targets >= 0
    stdout().print(Text(f"{'mean':>{LABEL_WIDTH}} entropy      KL  decided     loss  median rank  on top", style="dim"))
    for stage, name in enumerate(names):
        decided = (result.decision_stages <= stage).mean()
        line = f"{name:>{LABEL_WIDTH}} {result.entropies[stage].mean():7.2f} {result.divergences[stage].mean():7.2f}"
        line += f"{decided:9.0%}"
        if has_target.any():
            # A probability that float64 rounds to 0 has no logarithm.
            smallest = np.finfo(float).tiny
            losses = -np.log(np.maximum(result.target_probabilities[stage][has_target], smallest))
            median = rank_label(float(np.median(result.target_places[stage][has_target])))
            line += f"{losses.mean():9.2f} {median:>12} {result.target_on_top[stage][has_target].mean():7.0%}"
        stdout().print(line)
    depths = spelled_depths(result.decision_stages.tolist(), names)
    stdout().print(
        f"\nloss, rank and on top are those of {target or 'the next token'}; decided: the top token is the final one "
        f"from here on\ndecision depth: {depths}",
        soft_wrap=False,
        markup=False,
    )


def spelled_depths(decision_stages: "Sequence[int]", names: Sequence[str]) -> str:
    """`embed 3, L1 12`: how many positions are decided at each stage."""
    counts = {name: sum(1 for stage in decision_stages if stage == number) for number, name in enumerate(names)}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)
