"""Write the activations of a whole split, shard by shard.

A shard is a pure function of the model, the split and the settings, computed in batches of fixed windows; so an
interrupted run that is resumed ends with the same bytes. Memory holds one shard, whatever the size of the split.

Shapes: B window, T position, N row of a shard.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import hooked, matching_names, run_with_cache
from lumiere.data.batches import Windows
from lumiere.errors import LumiereError, check_choice, printable, shortened
from lumiere.files import DISK, open_file, writing
from lumiere.interpret.activation_dataset import (
    COLUMNS,
    DATA,
    DTYPES,
    FORMATS,
    MANIFEST,
    PARTIAL,
    ActivationDataset,
    Shard,
    check_shard,
    read_manifest,
)
from lumiere.interpret.activations import AXES
from lumiere.models.transformer import Transformer
from lumiere.persistence.manifest import hash_file

TOKENS_AT_ONCE = 4096
"""In a forward pass: whole windows, at least one."""
SHARD_BYTES = 128 * 2**20
COUNTED_AT_ONCE = 2**20
"""Windows whose rows are counted at once."""
HEADROOM = 1.01
"""Times the bytes of the rows: headers and rounding to blocks."""
ROW_GROUP = 8192
"""Rows that a reader of Parquet files takes at once."""
MAX_FLOAT16 = 65504.0
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.tmp")
NEW_FOLDER = "give a new folder"
FULL_HINT = "make room, or choose fewer --names or --dtype float16; the same command goes on where it stopped"


@dataclass(frozen=True)
class Plan:
    """What is written.

    Attributes:
        dataset: Without shards.
        split: Its name, which begins those of the files.
        windows_at_once: In a forward pass.
        windows_per_shard: A multiple of `windows_at_once`.
        rows_per_shard: One number per shard.
    """

    dataset: ActivationDataset
    split: str
    windows: Windows
    windows_at_once: int
    windows_per_shard: int
    rows_per_shard: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: activations and columns."""
        numbers = sum(int(np.prod(shape, dtype=np.int64)) for shape in self.dataset.shapes.values())
        return numbers * np.dtype(self.dataset.dtype).itemsize + 4 * len(COLUMNS)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows; headers come on top."""
        return self.row_bytes * self.dataset.num_rows

    def file(self, number: int) -> str:
        """Return the name of a shard's file."""
        return f"{self.split}-{number:05}-of-{len(self.rows_per_shard):05}.{self.dataset.format}"


def plan(
    folder: Path,
    model: Transformer,
    windows: Windows,
    split: str,
    patterns: Sequence[str],
    provenance: Mapping[str, Any],
    dtype: str = "float32",
    kind: str = "safetensors",
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Work out what `write` will write, without writing anything.

    Args:
        windows: Of the split. Rows are the positions at which a window predicts a token and which the window before has
            not shown.
        patterns: Names of activations, as in `matching_names`.
        provenance: Of the model and the split.
        dtype, kind: One of `DTYPES` and of `FORMATS`.
        shard_bytes: Bytes of a shard at most, unless one forward pass gives more.

    Raises:
        LumiereError: There is no such activation, or it has no row per position.
    """
    check_choice("dtype", dtype, DTYPES)
    check_choice("format", kind, FORMATS)
    names = matching_names(model, patterns)
    for name in names:
        axes = AXES.get(name.rpartition(".")[2], "T E")
        if not axes.startswith("T"):
            raise LumiereError(
                f"{name} has the axes {axes}, and not one row per position", "choose other --names; hook_z has rows"
            )
    with torch.inference_mode():
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.token_embedding.weight.device)
        _, probe = run_with_cache(model, token, names)
    shapes = {name: tuple(activation.shape[2:]) for name, activation in probe.items()}
    at_once = max(1, TOKENS_AT_ONCE // windows.context_size)
    about = {
        **provenance,
        "split": split,
        "names": list(shapes),
        "dtype": dtype,
        "format": kind,
        "context_size": windows.context_size,
        "sliding_window_size": windows.sliding_window_size,
        "only_last": windows.only_last,
        "num_windows": len(windows),
        "windows_at_once": at_once,
        "torch_version": torch.__version__,
    }
    dataset = ActivationDataset(folder, shapes, dtype, kind, 0, about, ())
    drafted = Plan(dataset, split, windows, at_once, at_once, ())
    per_shard = max(1, shard_bytes // (drafted.row_bytes * windows.context_size * at_once)) * at_once
    rows = rows_per_shard(windows, per_shard)
    about["windows_per_shard"] = per_shard
    return replace(
        drafted,
        dataset=replace(dataset, num_rows=sum(rows)),
        windows_per_shard=per_shard,
        rows_per_shard=tuple(rows),
    )


def rows_per_shard(windows: Windows, per_shard: int) -> list[int]:
    """Count the rows of each shard of `per_shard` windows, without reading the tokens."""
    at_once = max(1, COUNTED_AT_ONCE // per_shard) * per_shard
    found: list[int] = []
    for first in range(0, len(windows), at_once):
        indices = np.arange(first, min(first + at_once, len(windows)))
        start, end = row_bounds(windows, indices)
        found += np.add.reduceat(end - start, np.arange(0, len(indices), per_shard)).tolist()
    return found


def row_bounds(windows: Windows, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first position of each window that is a row, and the position after the last: (B,) both."""
    documents = windows.documents(indices)
    is_first = documents != windows.documents(indices - 1)
    is_first[indices == 0] = True
    end = np.clip(windows.lengths(indices) - 1, 0, windows.context_size)
    return np.where(is_first, 0, max(0, windows.sliding_window_size - 1)), end


def write(
    model: Transformer,
    planned: Plan,
    progress: Callable[[int, int], None] = lambda done, total: None,
    announce: Callable[[Plan, int], None] = lambda planned, done: None,
) -> ActivationDataset:
    """Write a dataset, or go on with one.

    Args:
        progress: Called with the number of shards done, and of all.
        announce: Called with the plan and the number of shards that are there, once nothing speaks against writing.

    Raises:
        LumiereError: The folder holds other files, or data of other settings; a shard that is there is damaged; an
            activation does not fit into float16; or there is no room, which is checked first.
    """
    folder, dataset = planned.dataset.folder, planned.dataset
    done, is_complete = finished_shards(planned)
    files = [planned.file(number) for number in range(len(planned.rows_per_shard))]
    missing = [number for number, file in enumerate(files) if file not in done]
    with writing(folder, FULL_HINT):
        if missing:
            room = planned.row_bytes * sum(planned.rows_per_shard[number] for number in missing)
            DISK.check_room(existing_parent(folder), HEADROOM * room)
        announce(planned, len(done))
        remove_temporary(folder)
        if is_complete and missing:  # a damaged shard was deleted
            DISK.rename(folder / MANIFEST, folder / PARTIAL)
        for number in missing:
            progress(len(done), len(files))
            done[files[number]] = write_shard(model, planned, number)
            present = tuple(done[file] for file in files if file in done)
            DISK.write(folder / PARTIAL, replace(dataset, shards=present).to_json())
        progress(len(files), len(files))
        if missing or not is_complete:
            DISK.rename(folder / PARTIAL, folder / MANIFEST)
    return replace(dataset, shards=tuple(done[file] for file in files))


def finished_shards(planned: Plan) -> tuple[dict[str, Shard], bool]:
    """Return the shards that a folder has, by file, and whether it was complete.

    Raises:
        LumiereError: It holds other files, or data of other settings; or one of them is damaged.
    """
    folder, dataset = planned.dataset.folder, planned.dataset
    name = next((name for name in (MANIFEST, PARTIAL) if (folder / name).exists()), None)
    found = dataset if name is None else read_manifest(folder, name)
    for key in sorted(dataset.provenance.keys() | found.provenance.keys()):
        ours, theirs = (about.get(key) for about in (dataset.provenance, found.provenance))
        if ours != theirs:
            problem = f"{str(folder)!r} was begun with {key} {_shown(theirs)}, and here it is {_shown(ours)}"
            raise LumiereError(problem, "give another folder, or the settings of this one")
    check_contents(planned)
    present = [shard for shard in found.shards if (folder / DATA / shard.file).exists()]
    for shard in present:
        check_shard(folder, shard, verify=True)
    return {shard.file: shard for shard in present}, name == MANIFEST


def check_contents(planned: Plan) -> None:
    """Refuse a folder that holds anything but what would be written.

    Raises:
        LumiereError: It does, or is a file, or cannot be read.
    """
    folder = planned.dataset.folder
    ours = {planned.file(number) for number in range(len(planned.rows_per_shard))}
    try:
        if not folder.exists():
            return
        others = [path.name for path in folder.iterdir() if path.name not in (DATA, MANIFEST, PARTIAL)]
        if (folder / DATA).exists():
            others += [f"{DATA}/{path.name}" for path in (folder / DATA).iterdir() if path.name not in ours]
    except OSError as error:
        raise LumiereError(f"{str(folder)!r} is no folder that can be read: {error.strerror}", NEW_FOLDER) from None
    if left := sorted(name for name in others if not TEMPORARY.fullmatch(name.rpartition("/")[2])):
        raise LumiereError(f"{str(folder)!r} holds other files: {shortened(printable(left[0]))}", NEW_FOLDER)


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process has left."""
    for place in (folder, folder / DATA):
        for path in place.iterdir() if place.exists() else ():
            if TEMPORARY.fullmatch(path.name):
                DISK.remove(path)


def existing_parent(folder: Path) -> Path:
    """Return the folder, or the closest one above that exists."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def _shown(value: Any) -> str:
    return shortened(printable(", ".join(map(str, value)) if isinstance(value, list) else str(value)))


def write_shard(model: Transformer, planned: Plan, number: int) -> Shard:
    """Compute and write a shard, under its name only when it is whole.

    Raises:
        LumiereError: An activation does not fit into float16.
        OSError: It cannot be written.
    """
    tensors = compute_shard(model, planned, number)
    path = planned.dataset.folder / DATA / planned.file(number)
    DISK.make_folder(path.parent, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if planned.dataset.format == "parquet":
            write_parquet(temporary, tensors)
        else:
            DISK.write_tensors(temporary, tensors, {"format": "pt"})
        DISK.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with open_file(path) as file:
        return Shard(path.name, planned.rows_per_shard[number], path.stat().st_size, hash_file(file))


def write_parquet(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors (N, ...) as columns of (nested) lists of fixed size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name, tensor in tensors.items():
        column = pa.array(tensor.reshape(-1).numpy())
        for size in reversed(tensor.shape[1:]):
            column = pa.FixedSizeListArray.from_arrays(column, size)
        columns[name] = column
    pq.write_table(pa.table(columns), path, row_group_size=ROW_GROUP, compression="none", use_dictionary=False)
    DISK.sync(path)


@torch.inference_mode()
def compute_shard(model: Transformer, planned: Plan, number: int) -> dict[str, Tensor]:
    """Return the columns and activations of a shard, on the CPU.

    Raises:
        LumiereError: An activation does not fit into float16.
    """
    windows, shapes, num_rows = planned.windows, planned.dataset.shapes, planned.rows_per_shard[number]
    dtype = getattr(torch, planned.dataset.dtype)
    found = {name: torch.empty(num_rows, dtype=torch.int32) for name in COLUMNS}
    found |= {name: torch.empty(num_rows, *shape, dtype=dtype) for name, shape in shapes.items()}
    device, positions, filled = model.token_embedding.weight.device, np.arange(windows.context_size), 0
    first = number * planned.windows_per_shard
    last = min(first + planned.windows_per_shard, len(windows))
    for start in range(first, last, planned.windows_at_once):
        indices = np.arange(start, min(start + planned.windows_at_once, last))
        tokens_BT = windows.cut(indices)[0][:, :-1]
        begin, end = row_bounds(windows, indices)
        is_row = (positions >= np.reshape(begin, (-1, 1))) & (positions < end[:, None])
        rows = slice(filled, filled + int(is_row.sum()))
        row_of = np.broadcast_to(np.arange(len(indices))[:, None], is_row.shape)[is_row]
        values = (
            tokens_BT[is_row],
            indices[row_of],
            windows.documents(indices)[row_of],
            np.broadcast_to(positions, is_row.shape)[is_row],
        )
        for name, value in zip(COLUMNS, values, strict=True):
            found[name][rows] = torch.from_numpy(value)
        mask = torch.from_numpy(is_row).to(device)
        hooks = {name: partial(_keep, name, found[name][rows], mask) for name in shapes}
        with hooked(model, hooks):
            model.final_residual(torch.from_numpy(np.ascontiguousarray(tokens_BT)).to(device))  # and no logits
        filled = rows.stop
    return found


def _keep(name: str, place: Tensor, mask: Tensor, activation: Tensor) -> None:
    """Copy the rows of an activation, (B, T, ...), to their place.

    Raises:
        LumiereError: They do not fit into float16.
    """
    rows = activation[mask]
    if place.dtype == torch.float16 and rows.numel():
        largest = max(abs(float(value)) for value in rows.aminmax())
        if largest > MAX_FLOAT16:
            problem = f"{name} has values up to {largest:,.0f}, and float16 holds {MAX_FLOAT16:,.0f}"
            raise LumiereError(problem, "write it with --dtype float32")
    place.copy_(rows)
