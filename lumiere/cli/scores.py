"""Evaluations as tables and as JSON."""

import sys
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from lumiere.api.evaluation import Evaluated, have_one_windowing, placed
from lumiere.cli.console import escape, stdout, table
from lumiere.evaluation.detailed import LossByGroup
from lumiere.evaluation.scoring import (
    CONFIDENCE,
    FEW_DOCUMENTS,
    NUM_RESAMPLES,
    PairedDifference,
    paired_difference,
)

SHOWN_POSITIONS = tuple(2**power for power in range(13))
METRICS = (
    ("loss", "loss", ".4f", "nats per token"),
    ("perplexity", "perplexity", ",.2f", "exp(loss)"),
    ("bits per byte", "bits_per_byte", ".4f", "comparable between tokenizers"),
    ("word perplexity", "word_perplexity", ",.1f", "words split at white space, line ends counted"),
    ("accuracy", "accuracy", ".2%", "top-1"),
    ("accuracy at 5", "accuracy_at_5", ".2%", "top-5"),
)
"""Name, key, format and meaning."""
OF_WHOLE_TEXTS = ("bits_per_byte", "word_perplexity")
"""Metrics that say little where only the last token of each text is scored."""


def as_values(evaluated: list[Evaluated]) -> dict[str, Any]:
    """Return one evaluation, or several with their differences from the first."""
    first, *others = evaluated
    if not others:
        return first.values
    return {
        "runs": [one.values for one in evaluated],
        "differences": [
            {"run": one.run.name, "less": first.run.name}
            | {name: None if d is None else asdict(d) for name, d in differences(first, one).items()}
            for one in others
        ],
    }


def differences(first: Evaluated, other: Evaluated) -> dict[str, PairedDifference | None]:
    """Return differences in bits per byte, and in loss if tokens and windows are the same."""
    is_alike = (first.tokenizer, first.windowing) == (other.tokenizer, other.windowing)
    names = ("bits_per_byte", "loss") if is_alike else ("bits_per_byte",)
    return {name: paired_difference(first.found.totals, other.found.totals, name) for name in names}


def show(evaluated: list[Evaluated]) -> None:
    show_several(evaluated) if len(evaluated) > 1 else show_one(evaluated[0])


def show_one(one: Evaluated) -> None:
    found, about, values, errors = one.found, one.about, one.values, one.found.standard_errors
    stdout().print(f"[bold]{about['run']}[/], checkpoint {about['checkpoint']} (step {about['step']:,})")
    show_corpus(about)
    if share := found.normalized_share:
        percent = f"{share:.2%}" if share >= 0.0001 else "less than 0.01%"
        stdout().print(f"normalization changes {percent} of the bytes; bytes are counted after it")
    show_windows(about)
    for name, key, form, meaning in METRICS:
        if about["protocol"] == "last" and key in OF_WHOLE_TEXTS:
            continue
        print_row(name, f"{values[key]:{form}}", meaning, "" if errors is None else f"± {errors[key]:{form}}")
    print_row("calibration error", f"{found.calibration.ece:.2%}", "ECE, 15 bins")
    if about["protocol"] == "windows":
        print_row("mean batch loss", f"{values['mean_batch_loss']:.4f}", "the model card's loss (4.4180)")
        perplexity = f"{values['mean_batch_perplexity']:,.2f}"
        print_row("mean batch perplexity", perplexity, "the model card's perplexity (85.01)")
    if errors is not None:
        count = found.totals.num_documents
        few = "" if count >= FEW_DOCUMENTS else f"; few documents: {count}"
        stdout().print(f"[dim]±: standard error, {found.num_resamples:,} bootstrap resamples of the documents{few}[/]")
    if found.baselines is not None:
        scores = [*((each.name, each) for each in found.baselines), ("this model", found.evaluation)]
        print_table(
            ["n-gram baselines", "loss", "perplexity", "bits per byte"],
            *([name, f"{it.loss:.4f}", f"{it.perplexity:,.2f}", f"{it.bits_per_byte:.4f}"] for name, it in scores),
        )
    show_groups("by position in the window", sampled_positions(found.by_position))
    if found.by_frequency is not None:
        show_groups("by token frequency in training", found.by_frequency)
    stdout().print(
        "\n{num_tokens:,} tokens in {num_windows:,} windows, {num_batches:,} batches of {batch_size}, "
        "{seconds:.1f} s".format_map(values)
    )


def show_corpus(about: dict[str, Any]) -> None:
    documents = f"{about['documents']:,} document{'s' * (about['documents'] != 1)}"
    corpus = f"{escape(about['corpus'])} ({about['corpus_sha256'][:8]})"
    stdout().print(f"{corpus}: {documents}, {about['num_bytes']:,} bytes")


def show_windows(about: dict[str, Any]) -> None:
    size, stride, scored = about["context_size"], about["stride"], about["tokens_scored"]
    if about["protocol"] == "windows":
        stdout().print(f"windows of {size} tokens that overlap by {about['sliding_window_size']}, as in training")
        stdout().print(f"{scored}; --stride N scores each once\n")
    elif about["protocol"] == "last":
        stdout().print(f"windows of {size} tokens, {placed(about)}, as in training")
        stdout().print(f"{scored}; --stride N scores all of them\n")
    else:
        stdout().print(f"strided: windows of {size} tokens, {placed(about)}")
        stdout().print(f"{scored}, with at least {size + 1 - stride} tokens of context where available\n")


def print_row(name: str, value: str, meaning: str, error: str = "") -> None:
    stdout().print(f"[bold]{name:21}[/]  {value:>10} {error:9}  [dim]{meaning}[/]")


def print_table(*rows: list[str]) -> None:
    sys.stdout.write("\n" + table(rows))


def show_groups(heading: str, groups: LossByGroup) -> None:
    rows = zip(groups.names, groups.losses, groups.counts, strict=True)
    lines = ([name, f"{loss:.4f}" if count else "-", f"{count:,}"] for name, loss, count in rows)
    print_table([heading, "loss", "tokens"], *lines)


def sampled_positions(groups: LossByGroup) -> LossByGroup:
    """Average over ranges of positions, each twice as long as the one before."""
    edges = [*(edge for edge in SHOWN_POSITIONS if edge <= len(groups.names)), len(groups.names) + 1]
    names, losses, counts = [], [], []
    for first, end in pairwise(edges):
        parts = list(zip(groups.losses[first - 1 : end - 1], groups.counts[first - 1 : end - 1], strict=True))
        count = sum(number for _, number in parts)
        nats = sum(loss * number for loss, number in parts if number)
        names.append(f"{first:,}" if end == first + 1 else f"{first:,} to {end - 1:,}")
        losses.append(nats / count if count else float("nan"))
        counts.append(count)
    return LossByGroup(names, losses, counts)


def show_several(evaluated: list[Evaluated]) -> None:
    first, *others = evaluated
    count = first.found.totals.num_documents
    show_corpus(first.about)
    if have_one_windowing(evaluated):
        show_windows(first.about)
    else:
        stdout().print("the windows differ, so losses have different contexts\n")
    sys.stdout.write(table(comparison_rows(evaluated)))
    for one in others:
        rows = [[f"{one.run.id} - {first.run.id}", "difference", "interval", "lower on"]]
        for name, found in differences(first, one).items():
            if found is None:
                sys.stdout.write("\na paired difference needs two documents or more\n")
                break
            interval = f"{found.low:+.4f} to {found.high:+.4f}"
            lower = f"{found.num_lower:,} of {found.num_documents:,} documents"
            rows.append([name.replace("_", " "), f"{found.difference:+.4f}", interval, lower])
        else:
            print_table(*rows)
    if count > 1:
        method = f"paired bootstrap, {NUM_RESAMPLES:,} resamples of documents"
        method = method if count >= FEW_DOCUMENTS else f"Student's t; few documents: {count}"
        stdout().print(f"[dim]interval: {CONFIDENCE:.0%}, {method}[/]")
    if any(one.tokenizer != first.tokenizer for one in others):
        sys.stdout.write("\nthe tokenizers differ; compare only bits per byte and word perplexity\n")


def comparison_rows(evaluated: list[Evaluated]) -> list[list[str]]:
    """Return a table with a column for each run."""
    all_values = [one.values for one in evaluated]
    rows = [["", *(one.run.id for one in evaluated)]]

    def add(name: str, template: str) -> None:
        rows.append([name, *(template.format_map(values) for values in all_values)])

    add("checkpoint", "{checkpoint} ({step:,})")
    places = ("at the end" if values["protocol"] == "last" else f"{values['stride']} apart" for values in all_values)
    rows.append(["windows", *(f"{v['context_size']}, {place}" for v, place in zip(all_values, places, strict=True))])
    add("tokens scored", "{num_tokens:,}")
    for name, key, form, _ in METRICS:
        add(name, f"{{{key}:{form}}}")
        if key == "bits_per_byte":
            if all(values["standard_errors"] for values in all_values):
                add("  standard error", "{standard_errors[bits_per_byte]:.4f}")
            if any(values["normalized_share"] for values in all_values):
                add("bytes normalized", "{normalized_share:.2%}")
    add("calibration error", "{calibration[ece]:.2%}")
    for index, baseline in enumerate(evaluated[0].found.baselines or []):
        scores = [one.found.baselines for one in evaluated]
        cells = (f"{each[index].bits_per_byte:.4f}" if each else "-" for each in scores)
        rows.append([f"{baseline.name}, bits per byte", *cells])
    return rows
