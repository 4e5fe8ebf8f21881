"""Checkpoints made by hand, by the documented formats alone: what the readers are measured with."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tests.checkpoints import seal

Shards = dict[str, tuple[int, Tensor]]
"""The tensors of a file: the first row of each, and its rows."""

METADATA = {"step": 512, "best_loss": 4.418, "note": "é \ud800 \x1f", "config": {"model": {"d_key": 32}}}


def whole_tensors() -> dict[str, Tensor]:
    """Uneven rows, no rows, no dimensions, and a NaN."""
    return {
        "model.weight": torch.arange(10, dtype=torch.float32).reshape(5, 2) / 7,
        "model.gain": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
        "model.none": torch.empty(0, 3),
        "optimizer.weight.exp_avg": torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2),
        "optimizer.weight.step": torch.tensor(3.0),
        "rng.cpu": torch.tensor([0, 7, 255], dtype=torch.uint8),
    }


def shared_out() -> dict[str, Shards]:
    """`whole_tensors` as three processes would have them."""
    tensors = whole_tensors()
    weight, gain, moment = tensors["model.weight"], tensors["model.gain"], tensors["optimizer.weight.exp_avg"]
    return {
        "shard-1.safetensors": {
            "model.weight": (0, weight[:2]),
            "model.gain": (0, gain[:1]),
            "model.none": (0, tensors["model.none"]),
        },
        "shard-2.safetensors": {"model.weight": (2, weight[2:4]), "model.gain": (1, gain[1:])},
        "shard-3.safetensors": {"model.weight": (4, weight[4:]), "model.gain": (3, gain[3:])},
        "moments-1.safetensors": {"optimizer.weight.exp_avg": (0, moment[:4])},
        "moments-2.safetensors": {"optimizer.weight.exp_avg": (4, moment[4:])},
        "steps.safetensors": {"optimizer.weight.step": (0, tensors["optimizer.weight.step"])},
        "rng.safetensors": {"rng.cpu": (0, tensors["rng.cpu"])},
    }


def make_folder(folder: Path, files: dict[str, Shards] | None = None, number: str = "2") -> Path:
    """Write `files`, and a manifest of format `number` that describes them."""
    folder.mkdir(parents=True)
    files = shared_out() if files is None else files
    entries: list[dict[str, Any]] = []
    tensors: dict[str, dict[str, Any]] = {}
    for index, (file, shards) in enumerate(files.items()):
        places = {
            name: {"saved_offsets": [start, *[0] * rows.dim()][: rows.dim()]} for name, (start, rows) in shards.items()
        }
        data = safetensors.torch.save(
            {name: rows.contiguous() for name, (_, rows) in shards.items()},
            {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)},
        )
        (folder / file).write_bytes(data)
        entries.append({"name": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for name, (start, rows) in shards.items():
            entry = tensors.setdefault(name, {"dtype": header[name]["dtype"], "shape": list(rows.shape), "shards": []})
            count = len(rows) if rows.dim() else 1
            if rows.dim():
                entry["shape"][0] = max(entry["shape"][0], start + count)
            if count:
                entry["shards"].append([index, start, start + count])
    seal(folder, {"lumiere_format": number, "metadata": METADATA, "files": entries, "tensors": tensors})
    return folder


def read(folder: Path) -> dict[str, Any]:
    """What the manifest says, without its hash."""
    manifest = json.loads((folder / "checkpoint.json").read_text())
    del manifest["sha256"]
    return manifest


def flip(name: str) -> Callable[[Path], object]:
    """A change of the last bit of a file in a folder."""

    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return change


def raw_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(actual[name]) == raw_bytes(tensor)


# Files of format 1

GROUPS = ("model", "optimizer", "rng")
NO_TENSORS = hashlib.sha256(b"").hexdigest()


def write_old(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write a file of format 1 with `METADATA`."""
    groups = {group: {} for group in GROUPS}
    for name, tensor in tensors.items():
        group, _, short = name.partition(".")
        groups[group][short] = tensor
    texts = old_texts(metadata=json.dumps(METADATA)) | {
        f"sha256.{group}": digest_of(found) for group, found in groups.items()
    }
    safetensors.torch.save_file(tensors, path, texts)
    return path


def digest_of(tensors: dict[str, Tensor]) -> str:
    """Hash names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + raw_bytes(tensor))
    return found.hexdigest()


def old_texts(**changes: Any) -> dict[str, Any]:
    """Return the texts in the header of a file of format 1 without tensors."""
    metadata = changes.pop("metadata", "{}")
    seal = hashlib.sha256(metadata.encode()).hexdigest() if isinstance(metadata, str) else ""
    hashes = {f"sha256.{group}": NO_TENSORS for group in GROUPS}
    return {
        "format": "pt", "lumiere_format": "1", "metadata": metadata, "sha256.metadata": seal, **hashes, **changes
    }  # fmt: skip
