"""Writes a model for another library, and refuses to if what was written computes anything else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lumiere.errors import FailedCheckError, LumiereError, nearest
from lumiere.export.expected import stated_tokens
from lumiere.export.folder import check_folder, new_folder, write_files
from lumiere.export.transformer_lens_folder import check_folder_by_equations, check_folder_by_loading, folder_files
from lumiere.interpret.result import Receipt
from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class Target:
    """A library to export to.

    Attributes:
        files: `(model, tokenizer_json, tokens (1, T), origin)` -> the folder's files by name.
        checks: `(folder, model)` -> a receipt, or None where the check needs what is not installed.
    """

    files: Callable[[Transformer, bytes, Tensor, Mapping[str, Any]], dict[str, bytes]]
    checks: tuple[Callable[[Path, Transformer], Receipt | None], ...]


TARGETS: Mapping[str, Target] = {
    "transformer-lens": Target(
        files=folder_files,
        checks=(check_folder_by_equations, lambda folder, model: check_folder_by_loading(folder)),
    ),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: their names.
        tokens: (T,) the ids on which the logits were compared.
        receipts: how far they were apart.
        skipped: how many checks need what is not installed.
    """

    files: tuple[str, ...]
    tokens: tuple[int, ...]
    receipts: tuple[Receipt, ...]
    skipped: int


def find_target(name: str) -> Target:
    """The library called `name`.

    Raises:
        LumiereError: Lumiere does not export to it.
    """
    if name not in TARGETS:
        guess = nearest(name, TARGETS)
        hint = f"did you mean {guess}?" if guess else f"it exports to {', '.join(TARGETS)} only"
        raise LumiereError(f"Lumiere does not export to {name!r}", hint)
    return TARGETS[name]


def export_model(
    target: Target,
    folder: Path,
    model: Transformer,
    tokenizer_json: bytes,
    ids: range,
    origin: Mapping[str, Any],
) -> Exported:
    """Write `model` to a new folder, once the logits that the written files give are found to be the model's.

    Args:
        folder: is not there, or empty.
        model: in evaluation mode, on the CPU.
        tokenizer_json: the model's tokenizer.
        ids: the token ids that are in use and not special.
        origin: where the model comes from, for people.

    Raises:
        LumiereError: the folder will not do, or the library has no such model. Nothing is written.
        FailedCheckError: the logits differ. Nothing is written.
    """
    check_folder(folder)
    tokens_BT = stated_tokens(model.context_size, ids)
    files = target.files(model, tokenizer_json, tokens_BT, origin)
    with new_folder(folder) as staging:
        write_files(staging, files)
        found = [check(staging, model) for check in target.checks]
        receipts = tuple(receipt for receipt in found if receipt is not None)
        for receipt in receipts:
            if not receipt.holds:
                raise FailedCheckError(
                    f"{receipt.law}: off by {receipt.error:.0e}, allowed {receipt.tolerance:.0e}; nothing was written",
                    "this is a bug of Lumiere, or of the library: please report it",
                )
    return Exported(tuple(files), tuple(tokens_BT[0].tolist()), receipts, found.count(None))
