"""`lumiere runs compare`."""

import sys
from typing import TYPE_CHECKING, Any

from lumiere.cli.console import number, print_json, show_note, table
from lumiere.cli.options import Json, RunReferences, RunsDir
from lumiere.cli.runs.ls import facts
from lumiere.errors import printable
from lumiere.persistence.runs import RunStore

if TYPE_CHECKING:
    from lumiere.persistence.catalog import Comparison, Reached


def compare_runs(
    runs: RunReferences,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Compare runs: settings that differ, and losses at the end and after equally many tokens.

    The common token count is the highest at or before which every run has an evaluation. Losses are the last ones
    measured up to it, without interpolation; the tokens at which each was measured are shown below it.

    Example: [bold]lumiere runs compare 3ka5 9xwz[/]
    """
    from lumiere.persistence.catalog import compare, distinct

    store = RunStore(runs_dir)
    comparison = compare(distinct([store.open(reference) for reference in runs]))
    if as_json:
        print_json(as_values(comparison))
        return
    sys.stdout.write(listing(comparison))
    if comparison.same_corpus is False:
        show_note("the corpora differ, so losses cannot be compared; compare bits per byte")


def as_values(comparison: "Comparison") -> dict[str, Any]:
    return {
        "runs": [
            facts(reached.entry)
            | {
                "last_training": reached.training,
                "last_evaluation": reached.evaluation,
                "tokens_per_second": reached.tokens_per_second,
                "at_equal_tokens": {
                    "training": reached.training_at._asdict() if reached.training_at else None,
                    "validation": reached.validation_at._asdict() if reached.validation_at else None,
                },
            }
            for reached in comparison.runs
        ],
        "differences": {key: list(values) for key, values in comparison.differences.items()},
        "common_tokens": comparison.common_tokens,
        "same_corpus": comparison.same_corpus,
    }


def listing(comparison: "Comparison") -> str:
    """Format a table with a column for each run: settings, then results."""
    from lumiere.cli.runs.show import setting

    runs = comparison.runs
    rows = [["", *(reached.entry.run.id for reached in runs)]]

    def add(name: str, *cells: str) -> None:
        rows.append([name, *cells])

    def section(name: str) -> None:
        rows.append([""] * (len(runs) + 1))
        rows.append([name, *[""] * len(runs)])

    add("status", *(printable(reached.entry.status) for reached in runs))
    add("parameters", *(number(reached.entry.record.num_parameters, ",") for reached in runs))
    section("settings that differ" if comparison.differences else "all settings are equal")
    for key, values in comparison.differences.items():
        add(f"  {printable(key)}", *map(setting, values))
    section("best")
    add("  validation loss", *(number(reached.entry.record.best_loss, ".4f") for reached in runs))
    add("  step", *(number(reached.entry.record.best_step, ",") for reached in runs))
    section("at the end")
    for name, value in END.items():
        add(f"  {name}", *(value(reached) for reached in runs))
    if comparison.common_tokens is not None:
        section(f"at {comparison.common_tokens:,} tokens, or the last measurement before")
        for name, kind in (("validation", "validation_at"), ("training", "training_at")):
            points = [getattr(reached, kind) for reached in runs]
            add(f"  {name} loss", *(f"{point.loss:.4f}" if point else "-" for point in points))
            add("    measured at", *(f"{point.tokens:,}" if point else "-" for point in points))
    return table(rows)


END = {
    "validation loss": lambda reached: number(reached.evaluation.get("val_loss"), ".4f"),
    "bits per byte": lambda reached: number(reached.evaluation.get("val_bits_per_byte"), ".4f"),
    "training loss": lambda reached: number(reached.training.get("loss"), ".4f"),
    "step": lambda reached: number(newest(reached).get("step"), ","),
    "tokens": lambda reached: number(newest(reached).get("tokens"), ","),
    "training seconds": lambda reached: number(newest(reached).get("time"), ",.1f"),
    "tokens/s": lambda reached: number(reached.tokens_per_second, ",.0f"),
}


def newest(reached: "Reached") -> dict[str, Any]:
    """Return the last training or evaluation, whichever is later."""
    lines = (reached.training, reached.evaluation)
    return max(lines, key=lambda line: line.get("step", -1))
