"""`lumiere export`: write a model for another library."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from lumiere.cli.console import escape, print_json, show_note, stdout
from lumiere.cli.inspect.command import show_receipts
from lumiere.cli.options import CheckpointName, Json, RunReference, RunsDir, open_model
from lumiere.errors import check_choice

if TYPE_CHECKING:
    from lumiere.persistence.loading import OpenedModel


def export(
    run: RunReference,
    folder: Annotated[Path, Argument(metavar="DIR", help="A new or empty folder.")],
    to: Annotated[str, Option(metavar="FORMAT", help="hf (Hugging Face), gguf (llama.cpp), onnx or transformer-lens.")],
    checkpoint: CheckpointName = "best",
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Write a model for another library, and run it there.

    Nothing is written if what the library computes differs from what Lumiere computes.

    Example: [bold]lumiere export latest my-model --to hf[/]
    """
    from lumiere import __version__
    from lumiere.api.analysis import model_provenance
    from lumiere.export.exporting import TARGETS, check_folder, export_model
    from lumiere.export.original import Original, need

    check_choice("export target", to, TARGETS)
    target = TARGETS[to]
    need(to, *target.packages)
    check_folder(folder)
    opened = open_model(run, checkpoint, "cpu", runs_dir)
    recorded = model_provenance(opened)
    provenance = {key: recorded[key] for key in ("run", "checkpoint", "step", "weights_sha256")}
    provenance["lumiere_version"] = __version__
    original = Original(opened.model, opened.tokenizer, provenance, card_of(opened))
    exported = export_model(target, folder, original)
    if as_json:
        receipts = [asdict(receipt) | {"holds": receipt.holds} for receipt in exported.receipts]
        result = {"files": list(exported.files), "token_ids": original.sample[0].tolist(), "receipts": receipts}
        print_json(provenance | {"to": to, "folder": str(folder)} | result)
    else:
        for name in exported.files:
            stdout().print(escape(str(folder / name)))
        show_receipts(exported.receipts)
    for note in exported.notes:
        show_note(note)


def card_of(opened: "OpenedModel") -> str | None:
    """Return the model card; None if training recorded no evaluation of the checkpoint."""
    from lumiere.report.model_card import gather, kept_evaluation, model_card

    evaluation = kept_evaluation(opened.run.record, opened.step)
    if evaluation is None:
        return None
    return model_card(gather(opened.run, opened.checkpoint, opened.step, evaluation))
