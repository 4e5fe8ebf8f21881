"""`lumiere runs compare`."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lumiere.cli.console import number, print_json, setting, show_note, table
from lumiere.cli.options import Json, RunReferences, RunsDir
from lumiere.cli.runs.ls import facts
from lumiere.errors import printable
from lumiere.persistence.runs import RunStore

if TYPE_CHECKING:
    from lumiere.persistence.catalog import Comparison


def compare_runs(runs: RunReferences, runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """Compare runs: settings that differ, and losses at the end and after equally many tokens.

    The common token count is the highest at or before which every run has an evaluation. Losses are the last ones
    measured up to it, without interpolation; the tokens at which each was measured are shown below it.

    Example: [bold]lumiere runs compare 3ka5 9xwz[/]
    """
    from lumiere.persistence.catalog import compare

    comparison = compare(RunStore(runs_dir).open_all(runs))
    if as_json:
        print_json(as_values(comparison))
        return
    sys.stdout.write(table(rows(comparison)))
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
                    name: point._asdict() if point else None
                    for name, point in (("training", reached.training_at), ("validation", reached.validation_at))
                },
            }
            for reached in comparison.runs
        ],
        "differences": {key: list(values) for key, values in comparison.differences.items()},
        "common_tokens": comparison.common_tokens,
        "same_corpus": comparison.same_corpus,
    }


def rows(comparison: "Comparison") -> list[list[str]]:
    """Return a table with a column for each run: settings, then results."""
    runs, found = comparison.runs, [["", *(reached.entry.run.id for reached in comparison.runs)]]

    def add(name: str, values: Iterable[Any], form: str | None = None) -> None:
        found.append([name, *(str(value) if form is None else number(value, form) for value in values)])

    def section(name: str) -> None:
        add("", [""] * len(runs))
        add(name, [""] * len(runs))

    records = [reached.entry.record for reached in runs]
    add("status", (printable(reached.entry.status) for reached in runs))
    add("parameters", (record.num_parameters for record in records), ",")
    section("settings that differ" if comparison.differences else "all settings are equal")
    for key, values in comparison.differences.items():
        add(f"  {printable(key)}", map(setting, values))
    section("best")
    add("  validation loss", (record.best_loss for record in records), ".4f")
    add("  step", (record.best_step for record in records), ",")
    section("at the end")
    add("  validation loss", (reached.evaluation.get("val_loss") for reached in runs), ".4f")
    add("  bits per byte", (reached.evaluation.get("val_bits_per_byte") for reached in runs), ".4f")
    add("  training loss", (reached.training.get("loss") for reached in runs), ".4f")
    newest = [max(reached.training, reached.evaluation, key=lambda line: line.get("step", -1)) for reached in runs]
    for name, key, form in (("step", "step", ","), ("tokens", "tokens", ","), ("training seconds", "time", ",.1f")):
        add(f"  {name}", (line.get(key) for line in newest), form)
    add("  tokens/s", (reached.tokens_per_second for reached in runs), ",.0f")
    if comparison.common_tokens is not None:
        section(f"at {comparison.common_tokens:,} tokens, or the last measurement before")
        for name in ("validation", "training"):
            points = [getattr(reached, f"{name}_at") for reached in runs]
            add(f"  {name} loss", (point and point.loss for point in points), ".4f")
            add("    measured at", (point and point.tokens for point in points), ",")
    return found
