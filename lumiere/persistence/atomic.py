"""Files that are either the old one or the whole new one, whenever the power goes."""

import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` so that no reader and no crash ever sees a part of it.

    Raises:
        OSError: as writing does; up to the moment of the replacement the old file is untouched.
    """
    import secrets

    path = Path(path)
    # Beside the target, because a replacement is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable; Windows has no way to ask for it and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
