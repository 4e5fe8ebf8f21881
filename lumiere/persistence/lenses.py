"""Lenses stored with a run: `lenses/<kind>-step-<N>.safetensors`, tied to the checkpoint that they were fitted to.

Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.errors import CheckpointError, LumiereError
from lumiere.files import parse_json, writing
from lumiere.persistence.metrics import to_json
from lumiere.persistence.runs import Run
from lumiere.persistence.tensor_files import check_memory, open_safetensors

if TYPE_CHECKING:
    from torch import Tensor

FOLDER, SUFFIX = "lenses", ".safetensors"
FILE_PATTERN = re.compile(r"[a-z]{1,20}-step-[0-9]{8,18}\.safetensors")
TENSORS = ("matrices", "offsets")
HINT = "make room or check the folder"


def lens_path(run: Run, kind: str, step: int) -> Path:
    """Return the file of the lens of that kind that belongs to the checkpoint of that step."""
    return run.path / FOLDER / f"{kind}-step-{step:08}{SUFFIX}"


def lens_names(run: Run) -> list[str]:
    """Return the names of the files of a run's lenses."""
    folder = run.path / FOLDER
    return sorted(path.name for path in folder.glob("*") if FILE_PATTERN.fullmatch(path.name))


def save_lens(run: Run, kind: str, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Store a lens atomically; replace an older one of the same kind and checkpoint.

    Args:
        about: everything needed to compute it again, the hash of the weights among it.

    Raises:
        LumiereError: It cannot be written, or `lenses` is a link, which could lead out of the run's folder.
    """
    import secrets

    path = lens_path(run, kind, step)
    if path.parent.is_symlink():
        raise LumiereError(f"{str(path.parent)!r} is a link", "remove it: lenses are stored in the run's own folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path, HINT):
        path.parent.mkdir(exist_ok=True)
        try:
            run.disk.write_tensors(temporary, tensors, {"about": to_json(about)})
            run.disk.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def load_lens(
    run: Run, kind: str, step: int, weights_sha256: str, shape: tuple[int, int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the lens of a kind that was fitted to a checkpoint.

    Args:
        weights_sha256: the hash of the checkpoint's weights.
        shape: the number of stages that a lens translates, and the width of the stream.

    Returns:
        Its tensors by name, (R - 1, E, E) and (R - 1, E), and how it was fitted.

    Raises:
        LumiereError: There is none, it belongs to other weights, or its file is damaged.
    """
    path = lens_path(run, kind, step)
    train = f"lumiere inspect lens --train {kind} --run {run.id}"
    if not path.exists():
        others = [name for name in lens_names(run) if name.startswith(f"{kind}-")]
        there = f"; there is {', '.join(others)}" if others else ""
        raise LumiereError(f"run {run.id} has no {kind} lens of step {step:,}{there}", train)
    with open_safetensors(path) as file:
        about = _about(path, file.metadata())
        if about.get("weights_sha256") != weights_sha256:
            raise LumiereError(f"{path.name} of run {run.id} was fitted to other weights than these", train)
        count, size = shape
        expected = {"matrices": [count, size, size], "offsets": [count, size]}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        if {name: part.get_shape() for name, part in slices.items()} != expected:
            raise _damaged(path, "its tensors are not those of a lens of this model")
        if {part.get_dtype() for part in slices.values()} != {"F32"}:
            raise _damaged(path, "its tensors are not of type float32")
        check_memory(path, [4 * count * size * size])
        tensors = {name: file.get_tensor(name) for name in TENSORS}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise _damaged(path, "it holds numbers that are not finite")
    return tensors, about


def _about(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        about = parse_json((metadata or {}).get("about", ""))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise _damaged(path, "it does not say what it was fitted to")
    return about


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{str(path)!r} is damaged: {reason}", "remove it, and train the lens again")
