"""Activations of a whole split on disk, and an iterator over them.

A folder holds `data/SPLIT-00000-of-00012.safetensors` (or `.parquet`) and `activations.json`, which lists these shards
with their hashes, says where the activations come from, and is written last. A row is one position of one window: its
activations, its token id, its window, its document, and its position in the window.

Shapes: N row; of an activation, (N, ...) with its axes after the position, such as (N, E) or (N, H, K).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.data.batches import permute
from lumiere.errors import LumiereError, nearest, printable, shortened
from lumiere.files import open_file, parse_json, read_file
from lumiere.persistence.manifest import hash_file
from lumiere.persistence.tensor_files import open_safetensors

MANIFEST = "activations.json"
DATA = "data"
FORMAT_NUMBER = 1
MAX_MANIFEST_BYTES = 100_000_000
COLUMNS = ("token", "window", "document", "position")
"""What stands beside the activations of a row, as int32."""
FORMATS = ("safetensors", "parquet")
DTYPES = ("float32", "float16")
PARTIAL = "activations.partial.json"
"""`activations.json` before it is complete."""
SHARD_NAME = re.compile(r"[a-z]+-[0-9]{5,}-of-[0-9]{5,}\.(safetensors|parquet)")
"""`datasets` finds files of this form in a folder `data`, and takes the first word for the split."""
WRITE_AGAIN = "delete the folder, and write it again"
OPEN_SHARDS = 128
"""Shards that are mapped into memory at once."""
MAPPED_BYTES = 2**26
"""Bytes of pages that are read before files are unmapped, so that memory does not grow with them."""
PAGE_BYTES = 2**16
"""Bytes that reading a single number may map: Linux maps 16 pages around it."""


@dataclass(frozen=True)
class Shard:
    """A file with some rows.

    Attributes:
        file: Its name in `data/`.
        sha256: Of its bytes.
    """

    file: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ActivationDataset:
    """Activations by name, one row per position.

    Attributes:
        shapes: Of a row of each activation, by its name.
        provenance: Everything needed to compute them again: run, checkpoint, hashes, split, sizes of windows.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    format: str
    num_rows: int
    provenance: Mapping[str, Any]
    shards: tuple[Shard, ...]
    _maps: dict[int, dict[str, np.ndarray]] = field(init=False, repr=False, compare=False, default_factory=dict)
    _mapped_bytes: list[int] = field(init=False, repr=False, compare=False, default_factory=lambda: [0])

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> "ActivationDataset":
        """Open a folder that `lumiere inspect cache --split` has written.

        Args:
            verify: Read all files and compare their hashes. Otherwise only their sizes are compared.

        Raises:
            LumiereError: The folder has no such data, is unfinished, or a file is missing, damaged or another one.
        """
        found = read_manifest(Path(folder))
        if sum(shard.num_rows for shard in found.shards) != found.num_rows:
            raise LumiereError(f"{str(found.folder / MANIFEST)!r} is damaged: its rows do not add up", WRITE_AGAIN)
        for shard in found.shards:
            check_shard(found.folder, shard, verify)
        return found

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def batches(
        self, names: str | Sequence[str] | None = None, batch_size: int = 1024, seed: int | str | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield all rows once, `batch_size` at a time; the last batch may be smaller.

        Args:
            names: Activations to read, or one of them. Default: all.
            seed: Of the order, the same at every call; give another one, such as `f"{seed} {epoch}"`, each epoch. None:
                the order of the text.

        Raises:
            LumiereError: As `rows`.
        """
        for first in range(0, self.num_rows, batch_size):
            indices = np.arange(first, min(first + batch_size, self.num_rows))
            yield self.rows(indices if seed is None else permute(indices, self.num_rows, key=str(seed)), names)

    def rows(self, indices: np.ndarray, names: str | Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the activations at `indices` by name, and the columns of `COLUMNS`; the files are memory-mapped.

        Raises:
            LumiereError: There is no such activation; a file is damaged; or the folder holds Parquet files.
        """
        if self.format != "safetensors":
            hint = f"read it with datasets.load_dataset({str(self.folder)!r}), or write it with --format safetensors"
            raise LumiereError(f"{str(self.folder)!r} holds Parquet files, which cannot be mapped into memory", hint)
        chosen = [names] if isinstance(names, str) else list(self.shapes if names is None else names)
        if unknown := [name for name in chosen if name not in self.shapes]:
            guess = nearest(unknown[0], self.shapes)
            hint = f"did you mean {guess}?" if guess else f"it has {', '.join(self.shapes)}"
            raise LumiereError(f"{str(self.folder)!r} has no activation {unknown[0]!r}", hint)
        ends = np.cumsum([shard.num_rows for shard in self.shards])
        places = np.searchsorted(ends, indices, side="right")
        shapes = {**dict.fromkeys(COLUMNS, ()), **{name: self.shapes[name] for name in chosen}}
        types = {name: np.int32 if name in COLUMNS else np.dtype(self.dtype) for name in shapes}
        found: dict[str, np.ndarray] = {}
        for number in np.unique(places):
            is_here = places == number
            local = indices[is_here] - (ends[number] - self.shards[number].num_rows)
            arrays = self._map(int(number), local, chosen)
            if not found:  # now the file is known to have such rows
                found = {name: np.empty((len(indices), *shape), types[name]) for name, shape in shapes.items()}
            for name, array in found.items():
                array[is_here] = arrays[name][local]
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def _map(self, number: int, rows: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Map a shard into memory; unmap all of them when many pages may have been read since the last time."""
        sizes = [4 * math.prod(self.shapes[name]) for name in names]
        pages = sum(min(len(rows) * max(size, PAGE_BYTES), int(np.ptp(rows) + 1) * size) for size in sizes)
        if self._mapped_bytes[0] + pages > MAPPED_BYTES or len(self._maps) >= OPEN_SHARDS:
            self._maps.clear()
            self._mapped_bytes[0] = 0
        self._mapped_bytes[0] += pages
        if number not in self._maps:
            shard = self.shards[number]
            self._maps[number] = map_safetensors(self.folder / DATA / shard.file, self.expected(shard))
        return self._maps[number]

    def expected(self, shard: Shard) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the type and the shape of each tensor of a shard, in the words of safetensors."""
        kind = {"float32": "F32", "float16": "F16"}[self.dtype]
        columns = dict.fromkeys(COLUMNS, ("I32", (shard.num_rows,)))
        return columns | {name: (kind, (shard.num_rows, *shape)) for name, shape in self.shapes.items()}

    def to_json(self) -> bytes:
        """Return the contents of `activations.json`."""
        return (json.dumps(self.summary(), indent=2) + "\n").encode()

    def summary(self) -> dict[str, Any]:
        """Return what stands in `activations.json`."""
        return {
            "format_number": FORMAT_NUMBER,
            "format": self.format,
            "dtype": self.dtype,
            "num_rows": self.num_rows,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "provenance": dict(self.provenance),
            "shards": [asdict(shard) for shard in self.shards],
        }


def map_safetensors(path: Path, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Return the tensors of a file as read-only arrays that are mapped into memory.

    Args:
        expected: Type and shape of each.

    Raises:
        LumiereError: The file is damaged, or has other tensors.
    """
    with open_safetensors(path):  # checks the header: types, shapes, and that the bytes are there
        pass
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length))
        data = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + length)
    header.pop("__metadata__", None)
    if {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()} != expected:
        raise LumiereError(f"{str(path)!r} has other tensors than {MANIFEST} says", "delete it, and write it again")
    types = {"I32": np.dtype("<i4"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
    return {
        name: data[slice(*entry["data_offsets"])].view(types[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def read_manifest(folder: Path, name: str = MANIFEST) -> ActivationDataset:
    """Read which shards a folder has, without opening them.

    Raises:
        LumiereError: There is no such file, or it is damaged.
    """
    path = folder / name
    try:
        values = parse_json(read_file(path, MAX_MANIFEST_BYTES))
        number = values["format_number"]
        if isinstance(number, int) and number > FORMAT_NUMBER:
            raise LumiereError(f"{str(path)!r} was written by a newer Lumiere", "update Lumiere")
        shapes = {str(key): tuple(map(_count, shape)) for key, shape in values["shapes"].items()}
        shards = tuple(
            Shard(str(entry["file"]), _count(entry["num_rows"]), _count(entry["num_bytes"]), str(entry["sha256"]))
            for entry in values["shards"]
        )
        rows, dtype, kind, provenance = (values[key] for key in ("num_rows", "dtype", "format", "provenance"))
        if dtype not in DTYPES or kind not in FORMATS or not isinstance(provenance, dict) or number != FORMAT_NUMBER:
            raise ValueError("a value is unknown")
        if any(not SHARD_NAME.fullmatch(shard.file) for shard in shards):
            raise ValueError("a shard has another name than ours")
        return ActivationDataset(folder, shapes, dtype, kind, _count(rows), provenance, shards)
    except FileNotFoundError:
        is_begun = (folder / PARTIAL).exists()
        hint = "run the same command again to finish it" if is_begun else "lumiere inspect cache --split writes one"
        problem = "is unfinished" if is_begun else f"has no {MANIFEST}"
        raise LumiereError(f"{str(folder)!r} {problem}", hint) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = shortened(printable(str(error)))
        raise LumiereError(f"{str(path)!r} is damaged: {reason}", WRITE_AGAIN) from None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a number is wrong")
    return value


def check_shard(folder: Path, shard: Shard, verify: bool) -> None:
    """Compare a file with what was written.

    Args:
        verify: Compare its hash and not only its size.

    Raises:
        LumiereError: It is missing, damaged or another file.
    """
    path, hint = folder / DATA / shard.file, "delete it, and run lumiere inspect cache --split again with this folder"
    try:
        with open_file(path) as file:
            same = path.stat().st_size == shard.num_bytes and (not verify or hash_file(file) == shard.sha256)
    except FileNotFoundError:
        raise LumiereError(f"{str(path)!r} is missing", hint.removeprefix("delete it, and ")) from None
    except OSError as error:
        raise LumiereError(f"{str(path)!r} cannot be read: {error.strerror}", hint) from None
    if not same:
        raise LumiereError(f"{str(path)!r} is damaged, or another file than was written", hint)
