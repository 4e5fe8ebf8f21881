"""`lumiere inspect probe`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from lumiere.api.inspection import Inspect
from lumiere.cli.console import escape, stdout
from lumiere.cli.inspect.command import Layers, analysis, show_wrapped

if TYPE_CHECKING:
    from lumiere.api.analysis import Analysis
    from lumiere.interpret.probe import Probe

MAX_CLASSES = 8
"""Counts of classes to print."""


@analysis(
    Inspect.probe,
    regex=Annotated[str | None, Option(metavar="PATTERN", help="Tell tokens whose text matches from the others.")],
    property=Annotated[
        str, Option(metavar="NAME", help="Of which token: token, next-token or previous-token; or position.")
    ],
    labels=Annotated[
        Path | None, Option(metavar="FILE", help='Labels of your own: a line is {"text": ..., "labels": [...]}.')
    ],
    classes=Annotated[int, Option(metavar="N", min=2, help="Without --regex: tell the N most frequent tokens apart.")],
    file=Annotated[Path | None, Option("--file", metavar="FILE", help="Text; blank lines separate documents.")],
    split=Annotated[str, Option(metavar="NAME", help="Without --file: windows of the validation or train split.")],
    windows=Annotated[int, Option(metavar="N", min=1, help="Read at most N windows.")],
    layer=Layers,
    balanced=Annotated[bool, Option("--balanced", help="Give all classes the same weight.")],
    save=Annotated[
        Path | None, Option("--save", metavar="FILE", help="Write the direction to a .safetensors file, for steering.")
    ],
)
def probe(found: "Analysis[Probe]") -> None:
    """What can be read off the residual stream? A linear probe, by stage, with controls.

    Documents are split into training, tuning and test. The penalty and the stage are chosen on the second.
    """
    show_probe(found.result)


def show_probe(result: "Probe") -> None:
    """Print the property with its classes, a line for each stage, and the sparse probes."""
    show_wrapped(f"{escape(result.subject)}\n")
    parts = zip(("training", "tuning", "test"), result.num_documents, result.counts, strict=True)
    for name, documents, counts in parts:
        listed = [f"{label} {count:,}" for label, count in zip(result.classes, counts, strict=True)]
        more = f", and {len(listed) - MAX_CLASSES} more" if len(listed) > MAX_CLASSES else ""
        show_wrapped(escape(f"{name}: {documents:,} documents; {', '.join(listed[:MAX_CLASSES])}{more}"))
    has_auc, has_intervals = bool(result.auc[0] == result.auc[0]), bool(result.gain_low[0] == result.gain_low[0])
    auc = f"{'AUC':>8}" if has_auc else ""
    stdout().print(
        f"\n[dim]{'stage':10}{'accuracy':>9}{'balanced':>10}{auc}{'over embedding':>24}{'selectivity':>13}[/]"
    )
    for row, stage in enumerate(result.stages):
        mark = "*" if row == result.chosen else " "
        line = f"{stage + mark:10}{result.accuracy[row]:9.1%}{result.balanced_accuracy[row]:10.1%}"
        line += f"{result.auc[row]:8.3f}" if has_auc else ""
        gain = f"{result.gain[row]:+.1%}"
        if has_intervals:
            gain += f" ({result.gain_low[row]:+.1%} to {result.gain_high[row]:+.1%})"
        stdout().print(f"{line}{gain:>24}{result.selectivity[row]:13.1%}")
    row = result.chosen
    low, high = result.accuracy_low[row], result.accuracy_high[row]
    interval = f", accuracy {low:.1%} to {high:.1%} (95 %, over documents)" if low == low else ""
    show_wrapped(
        f"\n* chosen on the tuning documents{interval}\nmost frequent class {result.majority:.1%}; most frequent class "
        f"of each token {result.by_token:.1%}; control task {result.control[row].mean():.1%} "
        f"({len(result.control[row])} seeds)"
    )
    stdout().print(
        f"\n[dim]coordinates of {result.stages[row]:5}" + "".join(f"{size:6}" for size in result.sizes) + "[/]"
    )
    for name, values in (("best", result.sparse), ("random", result.random_sparse)):
        stdout().print(f"{name:21}" + "".join(f"{value:6.0%}" for value in values))
    stdout().print()
