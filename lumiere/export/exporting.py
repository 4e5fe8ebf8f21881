"""Writes a model for another library, and refuses to if what was written computes anything else."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lumiere.errors import FailedCheckError, LumiereError, nearest
from lumiere.export.transformer_lens import (
    check_folder_by_equations,
    check_folder_by_loading,
    folder_files,
    stated_tokens,
)
from lumiere.files import sync_folder, write_atomically
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
                    f"{receipt.check}: error {receipt.error:.0e} (tolerance {receipt.tolerance:.0e}), nothing written",
                    "this is a bug of Lumiere, or of the library: please report it",
                )
    return Exported(tuple(files), tuple(tokens_BT[0].tolist()), receipts, found.count(None))


def check_folder(path: Path) -> None:
    """Refuses a path that no new folder can be made at; an empty folder will do.

    Raises:
        LumiereError: there is a file, or a folder that holds something or is the current one, or its own folder is not
            there.
    """
    choose = "choose another folder, or empty this one"
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise LumiereError(f"{str(path)!r} exists and is no folder", "choose another folder")
    if path.is_dir() and path.samefile(Path.cwd()):
        # It is replaced as a whole, and whoever stands in it would be left in a folder without a name.
        raise LumiereError(f"{str(path)!r} is the current folder", "name a folder in it")
    try:
        if path.is_dir() and any(path.iterdir()):
            raise LumiereError(f"the folder {str(path)!r} is not empty", choose)
    except OSError as error:
        raise LumiereError(f"the folder {str(path)!r} cannot be read: {error.strerror}", choose) from error
    if not path.absolute().parent.is_dir():
        raise LumiereError(f"there is no folder {str(path.parent)!r}", "make it first, or choose another")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends; if it raises, nothing is left.

        with new_folder(Path("out")) as staging:
            write_files(staging, {"a.txt": b"..."})

    Raises:
        LumiereError: as `check_folder`, or the folder cannot be written to.
    """
    check_folder(path)
    target = path.absolute()
    # Beside the target, because a rename is atomic within one file system only.
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        staging.mkdir()
        yield staging
        sync_folder(staging)
        if target.is_dir():
            target.rmdir()  # fails if something has come into it
        os.rename(staging, target)
        sync_folder(target.parent)
    except OSError as error:
        raise LumiereError(
            f"{str(path)!r} cannot be written: {error.strerror or error}", "make room, or choose another place"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes each file by its name.

    Raises:
        OSError: as writing does.
    """
    for name, data in files.items():
        write_atomically(folder / name, data)
