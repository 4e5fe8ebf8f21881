"""Open the weights of a GGUF file, the format of llama.cpp; quantized tensors are dequantized.

The package `gguf` reads the file and knows the quantizations. llama.cpp rotates neighboring pairs of queries and keys,
Lumiere pairs (i, i + d_key/2), so that their rows are reordered.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumiere.config.schema import ModelConfig
from lumiere.errors import LumiereError, printable, shortened
from lumiere.files import open_file
from lumiere.importing.architectures import Architecture, Source, valid_sizes
from lumiere.importing.huggingface import assembled
from lumiere.importing.rotary_factors import scaling_of
from lumiere.models.transformer import Transformer
from lumiere.persistence.tensor_files import check_memory
from lumiere.programs import install_command

MIN_KEY_BYTES, MIN_TENSOR_BYTES = 13, 24
"""Of an entry of the header: a name's length, a type and a value; a name's length, shape, type and offset."""
FACTORS = "rope_freqs.weight"
NAMES = {
    "token_embedding": "token_embd",
    "attention_norm": "blk.{layer}.attn_norm",
    "attention.value": "blk.{layer}.attn_v",
    "attention.output": "blk.{layer}.attn_output",
    "feedforward_norm": "blk.{layer}.ffn_norm",
    "feedforward.gate": "blk.{layer}.ffn_gate",
    "feedforward.up": "blk.{layer}.ffn_up",
    "feedforward.down": "blk.{layer}.ffn_down",
    "final_norm": "output_norm",
    "output_head": "output",
}


@dataclass(frozen=True)
class OpenedFile:
    """A model in a GGUF file.

    Attributes:
        fields: All keys of the header.
        quantization: The types of its tensors, as llama.cpp calls them.
    """

    model: Transformer
    fields: Mapping[str, Any]
    quantization: str


def open_model(path: str | Path) -> Transformer:
    """Return the model in a GGUF file, in float32, on the CPU, in evaluation mode; see `open_gguf`."""
    return open_gguf(Path(path)).model


def open_gguf(path: Path) -> OpenedFile:
    """Open a GGUF file of the architecture `llama`.

    Raises:
        LumiereError: The package `gguf` is missing; the file is missing or damaged, or holds a model that Lumiere
            cannot compute.
    """
    reader = _read(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    check_memory(path, [4 * int(tensor.n_elements) for tensor in reader.tensors])
    factors = dict(_tensors(path, (tensor for tensor in reader.tensors if tensor.name == FACTORS))).get(FACTORS)
    others = [tensor for tensor in reader.tensors if tensor.name != FACTORS]
    with valid_sizes(repr(str(path))):
        architecture = read_architecture(fields, {tensor.name for tensor in others}, factors)
    quantization = ", ".join(sorted({tensor.tensor_type.name for tensor in reader.tensors}))
    return OpenedFile(assembled(architecture, dict(_tensors(path, others))), fields, quantization)


def read_architecture(fields: dict[str, Any], tensors: set[str], factors: Tensor | None = None) -> Architecture:
    """Return the model that the keys of a GGUF file describe.

    Args:
        fields: All keys; those of the architecture begin with `llama.`.
        tensors: The names of all other tensors.
        factors: `rope_freqs.weight`, which the periods of rotary positions are multiplied by.

    Raises:
        LumiereError: The architecture is not `llama`, or a key is missing, unknown or without a meaning here.
    """
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise LumiereError(
            f"the file holds a model of the architecture {shortened(printable(str(kind)))}", "Lumiere reads llama"
        )
    left = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}

    def take(name: str, default: Any = None) -> Any:
        value = left.pop(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise LumiereError(f"the file lacks a number llama.{name}", "it is damaged, or of another architecture")
        return value

    width, num_heads = take("embedding_length"), take("attention.head_count")
    d_key = take("attention.key_length", width // max(num_heads, 1))
    size, base = take("rope.dimension_count", d_key), _shortest(take("rope.freq_base", 10_000.0))
    linear = take("rope.scaling.factor", take("rope.scale_linear", 0.0)) or 1.0
    kind = left.pop("rope.scaling.type", "linear")  # as llama.cpp, where a factor comes without a type
    if kind not in ("none", "linear"):
        raise LumiereError(
            f"the file has llama.rope.scaling.type {shortened(printable(str(kind)))}",
            "Lumiere computes none and linear, and the factors of Llama 3.1",
        )
    if (magnitude := take("rope.scaling.attn_factor", 1.0)) != 1:
        raise LumiereError(f"the file has llama.rope.scaling.attn_factor {magnitude}", "Lumiere computes only 1")
    original_size = take("rope.scaling.original_context_length", 0)
    left.pop("rope.scaling.finetuned", None)
    scaling = _scaling(factors, _shortest(linear) if kind == "linear" else 1.0, base, size, original_size)
    epsilon = _shortest(take("attention.layer_norm_rms_epsilon"))
    settings = ModelConfig.model_validate(
        {
            "embedding_size": width,
            "context_size": take("context_length"),
            "num_layers": take("block_count"),
            "num_heads": num_heads,
            "num_key_value_heads": take("attention.head_count_kv", num_heads),
            "d_key": d_key,
            "d_value": take("attention.value_length", d_key),
            "d_ff": take("feed_forward_length"),
            "norm_epsilon": epsilon,
            "positions": "rotary",
            "rotary_base": base,
            "rotary_fraction": size / d_key,
            "rotary_scaling": scaling,
            "tie_embeddings": "output.weight" not in tensors,
            "bias": "all" if any(name.endswith(".bias") for name in tensors) else "none",
        }
    )
    vocab_size = take("vocab_size", len(fields.get("tokenizer.ggml.tokens", [])))
    if left:
        raise LumiereError(
            f"the file has the key llama.{shortened(printable(min(left)))}",
            "Lumiere reads every key that changes what a model computes, and does not know this one",
        )
    sources = {ours: Source(theirs) for ours, theirs in NAMES.items()}
    for part, name in (("query", "attn_q"), ("key", "attn_k")):
        sources[f"attention.{part}"] = Source(f"blk.{{layer}}.{name}", half_split)
    return Architecture(vocab_size, settings, sources, unused=())


def _shortest(number: float) -> float:
    """Return the shortest number of which a file has the nearest float32, such as 1e-05."""
    return float(str(torch.tensor(number, dtype=torch.float32).numpy()))


def _scaling(
    factors: Tensor | None, linear: float, base: float, size: int, original_size: int
) -> dict[str, Any] | None:
    """Return our scaling of rotary positions.

    Args:
        factors: `rope_freqs.weight`.
        linear: What all periods are multiplied by besides.
        size: How many numbers of a head are rotated.
        original_size: The context size of the first training; 0 if the file does not have it.

    Raises:
        LumiereError: It is one that Lumiere does not compute.
    """
    if factors is None:
        return {"type": "linear", "factor": linear} if linear != 1 else None
    periods = base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    try:
        if factors.shape != periods.shape:
            raise ValueError(f"there are {factors.numel()} of them for {len(periods)} frequencies")
        return scaling_of(factors * linear, periods, original_size or None)
    except ValueError as error:
        raise LumiereError(f"{FACTORS} cannot be computed here: {error}", "Lumiere computes Llama 3.1's") from None


def half_split(rows: Tensor, settings: ModelConfig) -> Tensor:
    """Reorder the rows of queries or keys from neighboring pairs to pairs (i, i + d_key/2)."""
    return rows.unflatten(0, (-1, settings.d_key // 2, 2)).transpose(1, 2).flatten(0, 2)


def _read(path: Path) -> Any:
    """Return `gguf.GGUFReader(path)`, once the counts in its header are known to fit the file."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise LumiereError("GGUF files need the package gguf", f"install it: {install_command('gguf')}") from None
    damaged = LumiereError(f"{str(path)!r} is not a whole GGUF file", "fetch it again")
    try:
        with open_file(path) as file:
            magic, _, num_tensors, num_keys = struct.unpack("<4sIQQ", file.read(24))
        size = path.stat().st_size
        if magic != b"GGUF" or num_tensors * MIN_TENSOR_BYTES + num_keys * MIN_KEY_BYTES > size:
            raise damaged
        return GGUFReader(path)
    except OSError as error:
        raise LumiereError(f"{str(path)!r} cannot be read: {error.strerror}", "give the path of a GGUF file") from None
    except LumiereError:
        raise
    except Exception as error:  # the library raises whatever numpy raises
        raise damaged from error


def _tensors(path: Path, tensors: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    for tensor in tensors:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:  # NotImplementedError, or whatever numpy raises
            raise LumiereError(
                f"the tensor {shortened(printable(tensor.name))} of {str(path)!r} cannot be dequantized: {error}",
                f"it has the type {tensor.tensor_type.name}",
            ) from None
        yield tensor.name, torch.from_numpy(values.astype("float32"))
