"""The report of a run: one page with everything about its model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.api.analysis import model_provenance
from lumiere.api.inspection import summary_inputs
from lumiere.api.target import DEFAULT_TOKENS, InspectTarget
from lumiere.errors import LumiereError

if TYPE_CHECKING:
    from lumiere.report.report_page import Inspection, Text

NUM_WINDOWS = 256
"""Validation windows for the ablation and the neurons."""
SHOWN_WINDOWS = 2
REPEATED_TOKENS = 12
"""Random tokens in the repeated text that is shown: it shows best what an induction head does."""


@dataclass(frozen=True)
class Report:
    """A self-contained page, which a notebook shows in a frame.

    Attributes:
        page: The HTML.
        inspection: The results of all analyses on it.
        notes: What was left out, and why.
    """

    page: str = field(repr=False)
    inspection: "Inspection" = field(repr=False)
    notes: tuple[str, ...]

    @property
    def failed(self) -> list[str]:
        """The names of the analyses with a receipt that does not hold."""
        return [name for name, result in self.inspection.results() if not result.holds]

    def save(self, path: str | Path) -> None:
        """Write the page.

        Raises:
            LumiereError: The name does not end in .html, or the file cannot be written.
        """
        from lumiere.report.figures.figure import write_output

        check_page(Path(path))
        write_output(Path(path), self.page.encode())

    def _repr_html_(self) -> str:
        from lumiere.report.fragments import framed

        return framed(self.page)


def check_page(path: Path) -> None:
    """Check that a page can be written to `path`.

    Raises:
        LumiereError: The name does not end in .html, the path is a directory, or its directory does not exist.
    """
    from lumiere.report.figures.figure import check_output

    if path.suffix.lower() != ".html":
        raise LumiereError(f"{str(path)!r} is not an .html file", "give a name that ends in .html")
    check_output(path)


def make_report(target: InspectTarget, prompts: Sequence[str | Sequence[int]]) -> Report:
    """Compute all analyses on these prompts, or on texts of the validation split, and render the page."""
    from lumiere.persistence.metrics import read_history
    from lumiere.report.report_page import Text, build_page, inspect_model, origins

    opened = target.opened
    texts = [Text(target.prompt_tokens(prompt), "prompt") for prompt in prompts] or chosen_texts(target)
    if any(len(text.tokens) < 2 for text in texts):
        raise LumiereError("the text has one token and nothing to predict", "give a longer text")
    batches, token_counts, source = summary_inputs(target, NUM_WINDOWS)
    inspection = inspect_model(
        opened.model,
        texts,
        target.scored_sequences()[0],
        batches,
        target.spread_windows_if_any() if batches else None,
        token_counts,
        opened.tokenizer.text_ids,
        target.occurring_tokens,
    )
    about = {"source": source, "averaged_over": target.averaged_over, "seed": target.seed}
    history = read_history(opened.run.metrics_path, max_points=200)
    provenance = model_provenance(opened) | about
    page = build_page(
        inspection, opened.config, history, opened.tokenizer.label, provenance, origins(opened.run.record)
    )
    return Report(page, inspection, tuple(target.notes))


def chosen_texts(target: InspectTarget) -> "list[Text]":
    """Return starts of validation windows, spread over the split, and repeated random tokens."""
    from lumiere.report.report_page import Text

    texts = []
    try:
        count = len(target.validation_windows())
        for number in [count * part // SHOWN_WINDOWS for part in range(SHOWN_WINDOWS)]:
            tokens = target.validation_window(number)[:DEFAULT_TOKENS]
            if len(tokens) > 1:
                texts.append(Text(tokens, f"window {number} of the validation split"))
    except LumiereError as error:
        target.note(f"{error.message}: only random tokens are shown; --prompt gives a text")
    rows, origin = target.repeated_sequences(None, 1, at_most=REPEATED_TOKENS)
    return [*texts, Text(rows[0], f"{len(rows[0]) // 2} random tokens {origin}, twice")]
