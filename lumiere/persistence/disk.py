"""The file operations behind a save, each of which a crash may follow.

Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.files import sync_folder

if TYPE_CHECKING:
    from torch import Tensor


class Disk:
    """File operations that are durable when they return. Tests pass a disk that fails, or that is watched.

    All methods raise OSError.
    """

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True)

    def check_room(self, folder: Path, num_bytes: float) -> None:
        """Check that a file system has room before the first byte: a full disk affects other programs too."""
        if shutil.disk_usage(folder).free < num_bytes:
            raise OSError(errno.ENOSPC, f"it takes {num_bytes / 1e6:,.1f} MB, more than are free")

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file."""
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a new safetensors file, without a copy of its tensors in memory."""
        import safetensors.torch

        try:
            safetensors.torch.save_file(dict(tensors), path, dict(metadata))
        except safetensors.SafetensorError as error:
            code = re.search(r"os error ([0-9]+)", str(error))
            raise OSError(
                int(code[1]) if code else errno.EIO, os.strerror(int(code[1])) if code else str(error)
            ) from error
        # Safetensors makes it readable by its owner alone; the folder's mode shows what the user's umask allows.
        path.chmod(path.parent.stat().st_mode & 0o666)
        self.sync(path)

    def sync(self, path: Path) -> None:
        """Make a file's contents, or the names in a folder, durable."""
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or a folder. An existing file is replaced."""
        os.replace(old, new)
        self.sync(new.parent)

    def remove(self, path: Path) -> None:
        """Remove a file, a folder with its contents, or a link, but not what that points to."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


DISK = Disk()
