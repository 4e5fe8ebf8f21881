"""Evaluations as tables and as JSON."""

import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from lumiere.cli.console import escape, stdout, table
from lumiere.evaluation.detailed import DetailedEvaluation, LossByGroup
from lumiere.evaluation.scoring import CONFIDENCE, FEW_DOCUMENTS, NUM_RESAMPLES, PairedDifference, paired_difference
from lumiere.persistence.runs import Run

SHOWN_POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Evaluated:
    """A run and its evaluation.

    Attributes:
        tokenizer: Fingerprint of the tokenizer.
        about: What was scored, and how, as in the JSON.
    """

    run: Run
    tokenizer: str
    about: dict[str, Any]
    found: DetailedEvaluation


def values_of(one: Evaluated) -> dict[str, Any]:
    """Return an evaluation as JSON values, with the names of lm-eval."""
    found = one.found
    return {
        **one.about,
        **asdict(found.evaluation),
        "byte_perplexity": found.byte_perplexity,
        "normalized_share": found.normalized_share,
        "accuracy": found.accuracy,
        "accuracy_at_5": found.accuracy_at_5,
        "standard_errors": found.standard_errors,
        "bootstrap": {"over": "documents", "num_resamples": found.num_resamples, "seed": found.seed},
        "baselines": None if found.baselines is None else [asdict(baseline) for baseline in found.baselines],
        "calibration": asdict(found.calibration),
        "by_position": asdict(found.by_position),
        "by_frequency": None if found.by_frequency is None else asdict(found.by_frequency),
        "by_document": asdict(found.by_document),
    }


def as_values(evaluated: list[Evaluated]) -> dict[str, Any]:
    """Return one evaluation, or several with their differences from the first."""
    if len(evaluated) == 1:
        return values_of(evaluated[0])
    first, *others = evaluated
    return {
        "runs": [values_of(one) for one in evaluated],
        "differences": [
            {
                "run": one.run.name,
                "less": first.run.name,
                **{name: None if d is None else asdict(d) for name, d in differences(first, one).items()},
            }
            for one in others
        ],
    }


def windowing(one: Evaluated) -> tuple[Any, ...]:
    return tuple(one.about[key] for key in ("context_size", "stride", "protocol"))


def differences(first: Evaluated, other: Evaluated) -> dict[str, PairedDifference | None]:
    """Return differences in bits per byte, and in loss if tokens and windows are the same."""
    is_alike = (first.tokenizer, windowing(first)) == (other.tokenizer, windowing(other))
    figures = ("bits_per_byte", "loss") if is_alike else ("bits_per_byte",)
    return {figure: paired_difference(first.found.totals, other.found.totals, figure) for figure in figures}


def show(evaluated: list[Evaluated]) -> None:
    if len(evaluated) == 1:
        show_one(evaluated[0])
    else:
        show_several(evaluated)


def show_one(one: Evaluated) -> None:
    found, about, evaluation = one.found, one.about, one.found.evaluation
    stdout().print(f"[bold]{about['run']}[/], checkpoint {about['checkpoint']} (step {about['step']:,})")
    show_corpus(about)
    if found.normalized_share:
        stdout().print(
            f"normalization changes {share(found.normalized_share)} of the bytes; bytes are counted after it"
        )
    show_windows(about)
    rows = [
        ("loss", "loss", ".4f", "nats per token"),
        ("perplexity", "perplexity", ",.2f", "exp(loss)"),
        ("bits per byte", "bits_per_byte", ".4f", "comparable between tokenizers"),
        ("word perplexity", "word_perplexity", ",.1f", "words split at white space, line ends counted"),
        ("accuracy", "accuracy", ".2%", "top-1"),
        ("accuracy at 5", "accuracy_at_5", ".2%", "top-5"),
    ]
    for name, key, form, meaning in rows:
        value = getattr(found, key) if hasattr(found, key) else getattr(evaluation, key)
        error = "" if found.standard_errors is None else f"± {found.standard_errors[key]:{form}}"
        print_row(name, f"{value:{form}}", error, meaning)
    print_row("calibration error", f"{found.calibration.ece:.2%}", "", "ECE, 15 bins")
    if about["protocol"] == "windows":
        print_row("mean batch loss", f"{evaluation.mean_batch_loss:.4f}", "", "the model card's loss (4.4180)")
        perplexity = f"{evaluation.mean_batch_perplexity:,.2f}"
        print_row("mean batch perplexity", perplexity, "", "the model card's perplexity (85.01)")
    if found.standard_errors is not None:
        num_documents = found.totals.num_documents
        stdout().print(
            f"[dim]±: standard error, {found.num_resamples:,} bootstrap resamples of the documents"
            f"{'' if num_documents >= FEW_DOCUMENTS else f'; few documents: {num_documents}'}[/]"
        )
    show_baselines(one)
    show_groups("by position in the window", sampled_positions(found.by_position))
    if found.by_frequency is not None:
        show_groups("by token frequency in training", found.by_frequency)
    stdout().print(
        f"\n{evaluation.num_tokens:,} tokens in {evaluation.num_windows:,} windows, "
        f"{evaluation.num_batches:,} batches of {evaluation.batch_size}, {evaluation.seconds:.1f} s"
    )


def show_corpus(about: dict[str, Any]) -> None:
    documents = f"{about['documents']:,} document{'s' * (about['documents'] != 1)}"
    stdout().print(
        f"{escape(about['corpus'])} ({about['corpus_sha256'][:8]}): {documents}, {about['num_bytes']:,} bytes"
    )


def share(value: float) -> str:
    """Format a positive share; never as 0."""
    return f"{value:.2%}" if value >= 0.0001 else "less than 0.01%"


def heading(about: dict[str, Any], with_windows: bool) -> str:
    """Describe what was scored, and how, in one line."""
    corpus = f"{about['corpus']} ({about['corpus_sha256'][:8]})"
    if not with_windows:
        return corpus
    strided = "strided, " if about["protocol"] != "windows" else ""
    return f"{corpus}, {strided}windows of {about['context_size']} tokens, each {about['stride']} after the one before"


def show_windows(about: dict[str, Any]) -> None:
    size, stride = about["context_size"], about["stride"]
    if about["protocol"] == "windows":
        stdout().print(f"windows of {size} tokens that overlap by {about['sliding_window_size']}, as in training")
        stdout().print(f"{about['tokens_scored']}; --stride N scores each once\n")
    else:
        stdout().print(f"strided: windows of {size} tokens, each {stride} after the one before")
        stdout().print(
            f"{about['tokens_scored']}, with at least {size + 1 - stride} tokens of context where available\n"
        )


def print_row(name: str, value: str, error: str, meaning: str) -> None:
    stdout().print(f"[bold]{name:21}[/]  {value:>10} {error:9}  [dim]{meaning}[/]")


def show_baselines(one: Evaluated) -> None:
    if one.found.baselines is None:
        return
    evaluation = one.found.evaluation
    rows = [["n-gram baselines", "loss", "perplexity", "bits per byte"]]
    for name, it in (*((b.name, b) for b in one.found.baselines), ("this model", evaluation)):
        rows.append([name, f"{it.loss:.4f}", f"{it.perplexity:,.2f}", f"{it.bits_per_byte:.4f}"])
    sys.stdout.write("\n" + table(rows))


def sampled_positions(groups: LossByGroup) -> LossByGroup:
    """Average over ranges of positions, each twice as long as the one before."""
    edges = [edge for edge in SHOWN_POSITIONS if edge <= len(groups.names)]
    edges.append(len(groups.names) + 1)
    names, losses, counts = [], [], []
    for first, end in pairwise(edges):
        count = sum(groups.counts[first - 1 : end - 1])
        parts = zip(groups.losses[first - 1 : end - 1], groups.counts[first - 1 : end - 1], strict=True)
        nats = sum(loss * number for loss, number in parts if number)
        names.append(f"{first:,}" if end == first + 1 else f"{first:,} to {end - 1:,}")
        losses.append(nats / count if count else float("nan"))
        counts.append(count)
    return LossByGroup(names, losses, counts)


def show_groups(heading: str, groups: LossByGroup) -> None:
    rows = [[heading, "loss", "tokens"]]
    for name, loss, count in zip(groups.names, groups.losses, groups.counts, strict=True):
        rows.append([name, f"{loss:.4f}" if count else "-", f"{count:,}"])
    sys.stdout.write("\n" + table(rows))


def show_several(evaluated: list[Evaluated]) -> None:
    first, *others = evaluated
    show_corpus(first.about)
    if all(windowing(one) == windowing(first) for one in others):
        show_windows(first.about)
    else:
        stdout().print("the windows differ, so losses have different contexts\n")
    names = ["", *(one.run.id for one in evaluated)]
    rows = [names, ["checkpoint", *(f"{one.about['checkpoint']} ({one.about['step']:,})" for one in evaluated)]]
    rows.append(["windows", *(f"{one.about['context_size']}, {one.about['stride']} apart" for one in evaluated)])
    rows.append(["tokens scored", *(f"{one.found.evaluation.num_tokens:,}" for one in evaluated)])

    def add(name: str, key: str, form: str) -> None:
        values = [one.found if hasattr(one.found, key) else one.found.evaluation for one in evaluated]
        rows.append([name, *(format(getattr(value, key), form) for value in values)])

    add("loss", "loss", ".4f")
    add("perplexity", "perplexity", ",.2f")
    add("bits per byte", "bits_per_byte", ".4f")
    if all(one.found.standard_errors for one in evaluated):
        errors = [(one.found.standard_errors or {})["bits_per_byte"] for one in evaluated]
        rows.append(["  standard error", *(f"{error:.4f}" for error in errors)])
    if any(one.found.normalized_share for one in evaluated):
        rows.append(["bytes normalized", *(f"{one.found.normalized_share:.2%}" for one in evaluated)])
    add("word perplexity", "word_perplexity", ",.1f")
    add("accuracy", "accuracy", ".2%")
    add("accuracy at 5", "accuracy_at_5", ".2%")
    rows.append(["calibration error", *(f"{one.found.calibration.ece:.2%}" for one in evaluated)])
    for index, baseline in enumerate(first.found.baselines or []):
        found = [one.found.baselines for one in evaluated]
        cells = (f"{scores[index].bits_per_byte:.4f}" if scores else "-" for scores in found)
        rows.append([f"{baseline.name}, bits per byte", *cells])
    sys.stdout.write(table(rows))
    for one in others:
        show_differences(first, one)
    if first.found.totals.num_documents > 1:
        stdout().print(f"[dim]interval: {CONFIDENCE:.0%}, {interval_method(first.found.totals.num_documents)}[/]")
    if any(one.tokenizer != first.tokenizer for one in others):
        sys.stdout.write("\nthe tokenizers differ; compare only bits per byte and word perplexity\n")


def interval_method(num_documents: int) -> str:
    """Describe how the interval of a paired difference is computed."""
    if num_documents < FEW_DOCUMENTS:
        return f"Student's t; few documents: {num_documents}"
    return f"paired bootstrap, {NUM_RESAMPLES:,} resamples of documents"


def show_differences(first: Evaluated, other: Evaluated) -> None:
    rows = [[f"{other.run.id} - {first.run.id}", "difference", "interval", "lower on"]]
    for figure, found in differences(first, other).items():
        if found is None:
            sys.stdout.write("\na paired difference needs two documents or more\n")
            return
        interval = f"{found.low:+.4f} to {found.high:+.4f}"
        lower = f"{found.num_lower:,} of {found.num_documents:,} documents"
        rows.append([figure.replace("_", " "), f"{found.difference:+.4f}", interval, lower])
    sys.stdout.write("\n" + table(rows))
