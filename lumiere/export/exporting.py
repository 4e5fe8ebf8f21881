"""Write a model for another library, and only if the written files compute the model's logits."""

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lumiere.errors import FailedCheckError, LumiereError
from lumiere.export.transformer_lens import check_by_equations, check_by_loading, folder_files, sample_tokens
from lumiere.files import DISK
from lumiere.interpret.result import Receipt
from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class Target:
    """A library to export to.

    Attributes:
        files: `(model, tokenizer_json, tokens (1, T), origin)` -> contents of the folder's files by name.
        checks: `(folder, model)` -> a receipt; None if the check needs a library that is not installed.
    """

    files: Callable[[Transformer, bytes, Tensor, Mapping[str, Any]], dict[str, bytes]]
    checks: tuple[Callable[[Path, Transformer], Receipt | None], ...]


TARGETS: Mapping[str, Target] = {
    "transformer-lens": Target(folder_files, (check_by_equations, lambda folder, model: check_by_loading(folder)))
}


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        files: names of the files.
        tokens: (T,) ids on which the logits were compared.
        receipts: errors of the logits.
        skipped: number of checks that need a library that is not installed.
    """

    files: tuple[str, ...]
    tokens: tuple[int, ...]
    receipts: tuple[Receipt, ...]
    skipped: int


def export_model(
    target: Target,
    folder: Path,
    model: Transformer,
    tokenizer_json: bytes,
    ids: Sequence[int],
    origin: Mapping[str, Any],
) -> Exported:
    """Write `model` to a new folder.

    Args:
        folder: does not exist, or is empty.
        model: in evaluation mode, on the CPU.
        ids: token ids in use, without special tokens.
        origin: provenance of the model, for people.

    Raises:
        LumiereError: the folder cannot be used, or the library has no such model. Nothing is written.
        FailedCheckError: the logits differ. Nothing is written.
    """
    tokens_BT = sample_tokens(model.context_size, ids)
    files = target.files(model, tokenizer_json, tokens_BT, origin)
    with new_folder(folder) as staging:
        for name, data in files.items():
            DISK.write(staging / name, data)
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
    """Check that a new folder can be made at `path`, or that an empty one is there.

    Raises:
        LumiereError: it is a file, the current folder or not empty, or its parent does not exist.
    """
    choose = "choose another folder, or empty this one"
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise LumiereError(f"{str(path)!r} exists and is not a folder", "choose another folder")
    if path.is_dir() and path.samefile(Path.cwd()):  # replacing it would leave the shell in a deleted folder
        raise LumiereError(f"{str(path)!r} is the current folder", "name a folder in it")
    try:
        if path.is_dir() and any(path.iterdir()):
            raise LumiereError(f"the folder {str(path)!r} is not empty", choose)
    except OSError as error:
        raise LumiereError(f"the folder {str(path)!r} cannot be read: {error.strerror}", choose) from error
    if not path.absolute().parent.is_dir():
        raise LumiereError(f"the folder {str(path.parent)!r} does not exist", "create it first, or choose another")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `path` when the block ends; if it raises, nothing is left.

    Raises:
        LumiereError: as `check_folder`, or the folder cannot be written.
    """
    check_folder(path)
    target = path.absolute()
    # Beside the target, because a rename is atomic within one file system only.
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        staging.mkdir()
        yield staging
        DISK.sync(staging)
        if target.is_dir():
            target.rmdir()  # fails if a file has appeared in it
        DISK.rename(staging, target)
    except OSError as error:
        raise LumiereError(
            f"{str(path)!r} cannot be written: {error.strerror or error}", "free some space, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
