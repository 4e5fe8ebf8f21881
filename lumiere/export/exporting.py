"""Write a model for another library, and only if the written files compute the model's logits."""

import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lumiere.errors import FailedCheckError, LumiereError
from lumiere.export import gguf, hugging_face, onnx, transformer_lens
from lumiere.export.original import Original
from lumiere.files import DISK
from lumiere.interpret.result import Receipt


@dataclass(frozen=True)
class Target:
    """A format to export to.

    Attributes:
        write: Write the files into a folder.
        check: Run the written files in the other library. Yields receipts, and notes for the user.
        packages: Those that `check` cannot do without.
    """

    write: Callable[[Path, Original], None]
    check: Callable[[Path, Original], Iterable[Receipt | str]]
    packages: tuple[str, ...] = ()


TARGETS: Mapping[str, Target] = {
    "hf": Target(hugging_face.write, hugging_face.check, hugging_face.PACKAGES),
    "gguf": Target(gguf.write, gguf.check, gguf.PACKAGES),
    "onnx": Target(onnx.write, onnx.check, onnx.PACKAGES),
    "transformer-lens": Target(transformer_lens.write, transformer_lens.check),
}


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        files: Names of the files.
        receipts: Errors of what was compared.
        notes: What the user has to know.
    """

    files: tuple[str, ...]
    receipts: tuple[Receipt, ...]
    notes: tuple[str, ...]


def export_model(target: Target, folder: Path, original: Original) -> Exported:
    """Write a model to a new folder.

    Args:
        folder: Does not exist, or is empty.

    Raises:
        LumiereError: The folder cannot be used, or the format cannot hold the model. Nothing is written.
        FailedCheckError: The written model computes something else. Nothing is left.
    """
    receipts: list[Receipt] = []
    notes: list[str] = []
    with new_folder(folder) as staging:
        target.write(staging, original)
        files = tuple(sorted(path.name for path in staging.iterdir()))
        for receipt in target.check(staging, original):
            if isinstance(receipt, str):
                notes.append(receipt)
                continue
            receipts.append(receipt)
            if not receipt.holds:
                raise FailedCheckError(
                    f"{receipt.check}: error {receipt.error:.0e} (tolerance {receipt.tolerance:.0e}), nothing written",
                    "this is a bug of Lumiere, or of the library: please report it",
                )
    return Exported(files, tuple(receipts), tuple(notes))


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
