"""`lumiere export`: write a model for another library."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from lumiere.cli.console import escape, open_model, print_error, print_json, show_note, stdout
from lumiere.cli.inspect.command import CHECK_FAILED, show_receipts
from lumiere.cli.options import CheckpointName, Json, RunReference, RunsDir
from lumiere.errors import FailedCheckError, check_choice

if TYPE_CHECKING:
    from lumiere.export.exporting import Exported
    from lumiere.persistence.loading import OpenedModel


def export(
    run: RunReference,
    folder: Annotated[Path, Argument(metavar="DIR", help="A new or empty folder.")],
    to: Annotated[str, Option("--to", metavar="LIBRARY", help="Export to this library: transformer-lens.")],
    checkpoint: CheckpointName = "best",
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Write a model for another library, with logits to check it against.

    Nothing is written if a logit differs, computed by the library's equations or, if installed, by the library itself.

    Example: [bold]lumiere export latest --to transformer-lens my-model[/]
    """
    from lumiere.data.tokenizer import SPECIAL_TOKENS
    from lumiere.export.exporting import TARGETS, check_folder, export_model

    check_choice("export target", to, TARGETS)
    check_folder(folder)
    opened = open_model(run, checkpoint, "cpu", runs_dir)
    origin, tokenizer = facts(opened), opened.tokenizer
    ids = range(len(SPECIAL_TOKENS), len(tokenizer))
    try:
        exported = export_model(TARGETS[to], folder, opened.model, tokenizer.to_json().encode(), ids, origin)
    except FailedCheckError as error:
        print_error(error)
        raise Exit(CHECK_FAILED) from None
    if as_json:
        print_json(payload(to, folder, origin, exported))
    else:
        show(folder, exported)
    if exported.skipped:
        show_note(f"{to} is not installed; skipped the check by the library itself")


def facts(opened: "OpenedModel") -> dict[str, str | int]:
    """Return the provenance of the model."""
    from lumiere import __version__

    return {
        "run": opened.run.name,
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "weights_sha256": opened.weights_sha256,
        "lumiere_version": __version__,
    }


def payload(to: str, folder: Path, origin: dict[str, str | int], exported: "Exported") -> dict[str, object]:
    from dataclasses import asdict

    receipts = [asdict(receipt) | {"holds": receipt.holds} for receipt in exported.receipts]
    return {
        **origin,
        "to": to,
        "folder": str(folder),
        "files": list(exported.files),
        "token_ids": list(exported.tokens),
        "receipts": receipts,
    }


def show(folder: Path, exported: "Exported") -> None:
    for name in exported.files:
        stdout().print(escape(str(folder / name)))
    show_receipts(exported.receipts)
