"""Open a model in the form of Hugging Face, or a state dict: a folder with `config.json` and safetensors files.

Reads nothing but JSON and safetensors: no pickle, no code of the model, no link out of the folder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumiere.config.schema import ModelConfig
from lumiere.errors import LumiereError, printable, shortened
from lumiere.files import parse_json, read_file
from lumiere.importing import state_dicts
from lumiere.importing.architectures import Architecture, Source, read_architecture
from lumiere.models.transformer import Transformer
from lumiere.persistence.tensor_files import check_memory, open_safetensors

MAX_CONFIG_BYTES = 10_000_000
MAX_INDEX_BYTES = 100_000_000
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
BASES = ("model.", "transformer.", "gpt_neox.")
"""Prefixes of the names of all tensors but the output head's."""
MAX_NAMES = 3


@dataclass(frozen=True)
class OpenedFolder:
    """A model in a folder.

    Attributes:
        dtype: Type of its weights in the files, as torch calls it.
        files: The files that hold its weights.
    """

    model: Transformer
    model_type: str
    dtype: str
    files: tuple[Path, ...]


def open_model(folder: str | Path) -> Transformer:
    """Return the model in a folder, in float32, on the CPU, in evaluation mode; see `open_folder`."""
    return open_folder(Path(folder)).model


def open_folder(folder: Path, file: Path | None = None) -> OpenedFolder:
    """Open a model, in float32, on the CPU, in evaluation mode.

    Args:
        folder: With `config.json` of a type in `architectures.READERS` or of a state dict, and `model.safetensors` or
            the files that `model.safetensors.index.json` names.
        file: Weights to read instead.

    Raises:
        LumiereError: A file is missing or damaged, or the model is one that Lumiere cannot compute.
    """
    values = _read_settings(folder, file)
    kind = state_dicts.kind_of(values)
    architecture = read_architecture(values) if kind is None else None
    files = weight_files(folder) if file is None else [file]
    tensors, dtype = read_tensors(files)
    if architecture is None:
        architecture = state_dicts.read_architecture(str(kind), values, tensors)
    return OpenedFolder(assembled(architecture, tensors), kind or str(values["model_type"]), dtype, tuple(files))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder.

    Raises:
        LumiereError: There are none, the index names a file outside the folder, or a file is a link that does not lead
            into the Hub's own `blobs`.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        paths = [single]
    elif index.exists():
        places = _read_object(index, MAX_INDEX_BYTES).get("weight_map")
        files = sorted({str(file) for file in places.values()}) if isinstance(places, dict) else []
        if wrong := [file for file in files if not FILE_NAME.fullmatch(file)]:
            shown = shortened(printable(wrong[0]))
            raise LumiereError(f"{str(index)!r} names {shown!r}", "it may only name safetensors files in its folder")
        paths = [folder / file for file in files]
    else:
        pickles = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind)]
        hint = "it needs model.safetensors, or model.safetensors.index.json and the files that it names"
        if pickles:
            hint = f"{pickles[0]} is a pickle, which may run code: save it with save_pretrained of transformers 5"
        raise LumiereError(f"{str(folder)!r} has no safetensors files", hint)
    for path in paths:
        if path.is_symlink() and path.resolve().parent != folder.resolve().parent.parent / "blobs":
            raise LumiereError(f"{str(path)!r} is a link out of its folder", "replace it by the file")
    return paths


def read_tensors(paths: Sequence[Path]) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of files by name, without the prefix of the model inside, in float32, and their common type.

    Raises:
        LumiereError: A file is damaged, holds quantized weights, or is larger than the memory.
    """
    tensors: dict[str, Tensor] = {}
    dtypes: set[str] = set()
    for path in paths:
        with open_safetensors(path) as file:
            names = list(file.keys())
            check_memory(path, [4 * _numel(file.get_slice(name).get_shape()) for name in names])
            for name in names:
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    if name.endswith((".attn.bias", ".attention.bias", ".masked_bias", ".attn.mask")):
                        continue  # a causal mask that some files hold
                    raise LumiereError(
                        f"{str(path)!r} holds {shortened(printable(name))} as {tensor.dtype}",
                        "quantized weights cannot be read: save the model in float32, float16 or bfloat16",
                    )
                dtypes.add(str(tensor.dtype).removeprefix("torch."))
                short = name.removeprefix("_orig_mod.")  # of a model that torch.compile has wrapped
                short = short.removeprefix(next((base for base in BASES if short.startswith(base)), ""))
                if short in tensors:
                    raise LumiereError(
                        f"the files hold {shortened(printable(short))} twice, with different prefixes",
                        "keep one of them",
                    )
                tensors[short] = tensor.float()
    return tensors, ", ".join(sorted(dtypes))


def assembled(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Transformer:
    """Return the model of an architecture with the tensors of its source; biases that the source lacks are zero.

    Raises:
        LumiereError: A tensor is missing, has another shape, or is left over.
    """
    settings: dict[str, Any] = architecture.settings.model_dump() | {"dropout": 0.0}
    with torch.device("meta"):
        model = Transformer(architecture.vocab_size, **settings)
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, expected in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        layer = ""
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
        source = architecture.sources[module]
        theirs = source.tensor(layer, kind)
        used.add(theirs)
        if theirs not in tensors:
            if kind == "bias":
                found[name] = torch.zeros(expected.shape)
                continue
            raise LumiereError(f"the files lack the tensor {theirs}", "config.json describes a model that has it")
        tensor = arranged(source, tensors[theirs], architecture.settings)
        if tensor is None or tensor.shape != expected.shape:
            shapes = tuple(tensors[theirs].shape), tuple(expected.shape)
            raise LumiereError(
                f"the tensor {theirs} has the shape {shapes[0]}, which is not that of config.json",
                f"{name} would have {shapes[1]}",
            )
        found[name] = tensor.contiguous()
    unused = {name for name in tensors if name.endswith(architecture.unused)}
    if architecture.settings.tie_embeddings:
        unused.add(architecture.sources["output_head"].tensor("", "weight"))
    if left := sorted(tensors.keys() - used - unused):
        names = ", ".join(shortened(printable(name)) for name in left[:MAX_NAMES])
        rest = f" and {len(left) - MAX_NAMES} more" if len(left) > MAX_NAMES else ""
        raise LumiereError(
            f"the files hold tensors that config.json has no place for: {names}{rest}",
            "leaving them out would change what the model computes",
        )
    model.load_state_dict(found, assign=True)
    return model.eval()


def arranged(source: Source, tensor: Tensor, settings: ModelConfig) -> Tensor | None:
    """Return one of our tensors of one of the source's; None if that one has too few or other axes."""
    try:
        return source.arrange(tensor, settings)
    except (IndexError, RuntimeError):
        return None


def _read_settings(folder: Path, file: Path | None) -> dict:
    """Read `config.json`; where it is missing beside a state dict, say how to write it."""
    file = file or folder / "model.safetensors"
    hint = "give the folder of a model in the form of Hugging Face"
    if not (folder / "config.json").exists() and file.exists():
        with open_safetensors(file) as opened:
            hint = state_dicts.hint_for(opened.keys()) or hint
    return _read_object(folder / "config.json", MAX_CONFIG_BYTES, hint)


def _read_object(path: Path, limit: int, hint: str = "restore the file") -> dict:
    try:
        values = parse_json(read_file(path, limit))
    except FileNotFoundError:
        raise LumiereError(f"{str(path)!r} does not exist", hint) from None
    except (OSError, ValueError) as error:
        raise LumiereError(f"{str(path)!r} cannot be read: {error}", "restore the file") from None
    if not isinstance(values, dict):
        raise LumiereError(f"{str(path)!r} is not a mapping", "restore the file")
    return values


def _numel(shape: list[int]) -> int:
    return torch.Size(shape).numel()
