"""`lumiere export`: write a model for another library."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lumiere.cli.console import escape, print_json, show_note, stdout
from lumiere.cli.inspect.command import show_receipts
from lumiere.cli.options import CheckpointName, Json, RunReference, RunsDir, open_model
from lumiere.errors import check_choice


def export(
    run: RunReference,
    folder: Annotated[Path, Argument(metavar="DIR", help="A new or empty folder.")],
    to: Annotated[str, Option(metavar="LIBRARY", help="Export to this library: transformer-lens.")],
    checkpoint: CheckpointName = "best",
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Write a model for another library, with logits to check it against.

    Nothing is written if a logit differs, computed by the library's equations or, if installed, by the library itself.

    Example: [bold]lumiere export latest --to transformer-lens my-model[/]
    """
    from lumiere import __version__
    from lumiere.api.analysis import model_provenance
    from lumiere.export.exporting import TARGETS, check_folder, export_model

    check_choice("export target", to, TARGETS)
    check_folder(folder)
    opened = open_model(run, checkpoint, "cpu", runs_dir)
    tokenizer = opened.tokenizer
    recorded = model_provenance(opened)
    provenance = {key: recorded[key] for key in ("run", "checkpoint", "step", "weights_sha256")}
    provenance["lumiere_version"] = __version__
    exported = export_model(
        TARGETS[to], folder, opened.model, tokenizer.to_json().encode(), tokenizer.text_ids, provenance
    )
    if as_json:
        receipts = [asdict(receipt) | {"holds": receipt.holds} for receipt in exported.receipts]
        result = {"files": list(exported.files), "token_ids": list(exported.tokens), "receipts": receipts}
        print_json(provenance | {"to": to, "folder": str(folder)} | result)
    else:
        for name in exported.files:
            stdout().print(escape(str(folder / name)))
        show_receipts(exported.receipts)
    if exported.skipped:
        show_note(f"{to} is not installed; skipped the check by the library itself")
