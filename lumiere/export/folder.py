"""A folder that is there whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumiere.errors import LumiereError
from lumiere.files import sync_folder, write_atomically


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
