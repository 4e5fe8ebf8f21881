"""Models for TransformerLens, in the form that `TransformerBridge.boot_native` builds (version 4.3).

Shapes: B batch, T position, E embedding_size, H head, K d_key, F d_ff, Vocab vocab_size.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lumiere.components.layers import sinusoids_at
from lumiere.errors import FailedCheckError, LumiereError, shortened
from lumiere.export.original import FLOAT32_TOLERANCE, Original, render
from lumiere.files import DISK
from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, relative_error
from lumiere.models.transformer import Transformer
from lumiere.programs import install_command

NORMS = {"rms": "RMS", "layer": "LN", "layer_plain": "LNPre", "none": None}
"""TransformerLens's `normalization_type`."""
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
"""Its `act_fn`."""
ATTENTION = {"query": "attn.q", "key": "attn.k", "value": "attn.v", "output": "attn.o"}
FEEDFORWARD = {"gate": "mlp.gate", "up": "mlp.in", "down": "mlp.out"}
"""Linear layers of a block that TransformerLens calls otherwise."""


def check_settings(model: Transformer) -> None:
    """Check that `boot_native` of TransformerLens 4.3 has every part of the model.

    Raises:
        LumiereError: It lacks one, which is named.
    """
    settings = model.settings
    has_windows = any(window is not None and window < model.context_size for window in model.windows)
    lacks = {
        "attention_windows": (has_windows, "has no attention windows"),
        "parallel_blocks": (settings.parallel_blocks, "computes one part after the other"),
        "query_key_norm": (settings.query_key_norm, "has no norms of queries and keys"),
        "attention_scale": (settings.attention_scale == 1 and model.d_key > 1, "refuses unscaled scores"),
        "bias": (settings.bias == "all" and settings.is_gated, "has no biases in gated feed-forward parts"),
        "rotary_base": (settings.rotary_size > 0 and settings.rotary_base % 1 != 0, "has whole numbers there"),
    }
    for name, (is_lacking, reason) in lacks.items():
        if is_lacking:
            raise LumiereError(
                f"the model has {name} {getattr(settings, name)!r}, which TransformerLens cannot compute",
                f"boot_native of TransformerLens 4.3 {reason}",
            )
    if model.d_key != model.d_value:
        raise LumiereError(
            f"the heads have d_key {model.d_key} and d_value {model.d_value}; TransformerLens has one width for both",
            "train with model.d_key equal to model.d_value",
        )


def bridge_config(model: Transformer) -> dict[str, Any]:
    """Return the arguments of `TransformerBridgeConfig`, and its attribute `rope_scaling` if rotations are scaled.

    Raises:
        LumiereError: As `check_settings`.
    """
    check_settings(model)
    settings = model.settings
    config: dict[str, Any] = {
        "model_name": "lumiere",
        "n_layers": model.num_layers,
        "d_model": model.embedding_size,
        "n_ctx": model.context_size,
        "d_vocab": model.vocab_size,
        "n_heads": model.num_heads,
        "d_head": model.d_key,
        "d_mlp": model.d_ff,
        "normalization_type": NORMS[settings.norm],
        "eps": settings.norm_epsilon,
        "positional_embedding_type": "rotary" if settings.rotary_size else "standard",
    }
    if settings.feedforward == "none":
        config["attn_only"] = True
    else:
        config |= {"act_fn": ACTIVATIONS[settings.feedforward], "gated_mlp": settings.is_gated}
    if settings.rotary_size:
        config |= {"rotary_dim": settings.rotary_size, "rotary_base": settings.rotary_base}
        if (scaling := settings.rotary_scaling) is not None:
            config["rope_scaling"] = {"rope_type": scaling.type, "factor": scaling.factor}
            if scaling.type == "llama3":
                config["rope_scaling"] |= {
                    "original_max_position_embeddings": scaling.original_context_size,
                    "low_freq_factor": scaling.low_frequency_factor,
                    "high_freq_factor": scaling.high_frequency_factor,
                }
    if settings.key_value_heads != model.num_heads:
        config["n_key_value_heads"] = settings.key_value_heads
    if settings.attention_scale is not None:
        config["attn_scale"] = 1 / settings.attention_scale  # they divide
    return config


def bridge_weights(model: Transformer) -> dict[str, Tensor]:
    """Return the weights by the names of `TransformerBridge.state_dict()`.

    What TransformerLens has and Lumiere lacks is zero: biases, and positions if there are none. A tied output head is a
    copy, and sinusoidal positions are a table.
    """
    left = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    embedding = left.pop("token_embedding.weight")
    left.pop("output_head.weight", None)
    theirs = {"embed.weight": embedding, "unembed.weight": model.unembedding.detach().cpu().clone()}
    theirs["unembed.bias"] = torch.zeros(model.vocab_size, dtype=embedding.dtype)
    if not model.settings.rotary_size:
        positions = torch.zeros(model.context_size, model.embedding_size, dtype=embedding.dtype)
        if model.settings.positions == "sinusoidal":
            positions = sinusoids_at(torch.arange(model.context_size), model.embedding_size, torch.float64)
        theirs["pos_embed.weight"] = left.pop("position_embedding.weight", positions)
    parts = {"final_norm": "ln_final"}
    for layer in range(model.num_layers):
        names = {"attention_norm": "ln1", "feedforward_norm": "ln2"}
        names |= {f"attention.{ours}": name for ours, name in ATTENTION.items()}
        names |= {f"feedforward.{ours}": name for ours, name in FEEDFORWARD.items()}
        parts |= {f"blocks.{layer}.{ours}": f"blocks.{layer}.{name}" for ours, name in names.items()}
    for name, value in left.items():
        part, _, kind = name.rpartition(".")
        if part.endswith((".query", ".key")) and model.settings.rotary_size:
            value = neighboring_pairs(value, model.d_key, model.settings.rotary_size)
        theirs[f"{parts[part]}.{kind}"] = value
        # Their attention and plain feed-forward parts always have biases.
        is_linear = ".attention." in part or (".feedforward." in part and not model.settings.is_gated)
        if is_linear and f"{part}.bias" not in left:
            theirs[f"{parts[part]}.bias"] = torch.zeros(len(value), dtype=value.dtype)
    return {name: weight.contiguous() for name, weight in theirs.items()}


def neighboring_pairs(rows: Tensor, d_key: int, size: int) -> Tensor:
    """Reorder rows of queries or keys from our rotary pairs, (i, i + R/2), to theirs, which are neighbors.

    Scores do not change, since queries and keys are reordered alike.

    Args:
        rows: A weight or a bias.
        size: R, how many of each head's rows are rotated.
    """
    heads = rows.unflatten(0, (-1, d_key))
    turned, rest = heads.tensor_split([size], dim=1)
    first, second = turned.chunk(2, dim=1)
    return torch.cat([torch.stack([first, second], dim=2).flatten(1, 2), rest], dim=1).flatten(0, 1)


THEIR_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * x.sigmoid(),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_new": lambda x: x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}


@torch.inference_mode()
def bridge_logits(config: dict[str, Any], weights: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    """Compute the logits of TransformerLens's `NativeModel` from its equations, in float64: (B, T, Vocab).

    Shares no code with Lumiere's model, so that exports are checked without TransformerLens.
    """
    w = {name: weight.double() for name, weight in weights.items()}
    length, d_head, num_heads = tokens_BT.shape[1], config["d_head"], config["n_heads"]
    hidden_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
    kind, rotates = config["normalization_type"], config["positional_embedding_type"] == "rotary"
    divisor = config.get("attn_scale", d_head**0.5)
    repeats = num_heads // config.get("n_key_value_heads", num_heads)

    def norm(x_BTE: Tensor, name: str) -> Tensor:
        if kind is None:
            return x_BTE
        if kind.startswith("LN"):
            x_BTE = x_BTE - x_BTE.mean(-1, keepdim=True)
        x_BTE = x_BTE / (x_BTE.pow(2).mean(-1, keepdim=True) + config["eps"]).sqrt()
        return x_BTE * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    resid_BTE = w["embed.weight"][tokens_BT]
    if not rotates:
        resid_BTE = resid_BTE + w["pos_embed.weight"][:length]
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}"
        x_BTE = norm(resid_BTE, f"{block}.ln1")
        q, k, v = (linear(x_BTE, f"{block}.attn.{part}").unflatten(-1, (-1, d_head)).transpose(1, 2) for part in "qkv")
        if rotates:
            q, k = (rotated(x, config) for x in (q, k))
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        scores_BHTT = (q @ k.transpose(-1, -2) / divisor).masked_fill(hidden_TT, -torch.inf)
        z = (scores_BHTT.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        resid_BTE = resid_BTE + linear(z, f"{block}.attn.o")
        if config.get("attn_only"):
            continue
        x_BTE, activation = norm(resid_BTE, f"{block}.ln2"), THEIR_ACTIVATIONS[config["act_fn"]]
        neurons_BTF = linear(x_BTE, f"{block}.mlp.in")
        if config["gated_mlp"]:
            neurons_BTF = activation(linear(x_BTE, f"{block}.mlp.gate")) * neurons_BTF
        else:
            neurons_BTF = activation(neurons_BTF)
        resid_BTE = resid_BTE + linear(neurons_BTF, f"{block}.mlp.out")
    return linear(norm(resid_BTE, "ln_final"), "unembed")


def rotated(x_BHTK: Tensor, config: dict[str, Any]) -> Tensor:
    """RoPE on neighboring pairs of the first `rotary_dim` numbers, as products of complex numbers."""
    length, size, scaling = x_BHTK.shape[-2], config["rotary_dim"], config.get("rope_scaling")
    frequencies = config["rotary_base"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if scaling is not None:
        slow = frequencies / scaling["factor"]
        if scaling["rope_type"] == "llama3":
            # How often each pair turns within the original context decides.
            turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            slow = torch.lerp(slow, frequencies, ((turns - low) / (high - low)).clamp(0, 1))
        frequencies = slow
    angles_TP = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    turned, rest = x_BHTK.tensor_split([size], dim=-1)
    turned = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angles_TP), angles_TP)).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


FIRST_VERSION = 4
"""Of TransformerLens: older ones have no `boot_native`."""


@torch.inference_mode()
def write(folder: Path, original: Original) -> None:
    """Write weights, config, tokenizer, expected logits, and a program that boots the model.

    Raises:
        LumiereError: TransformerLens has no such model.
    """
    model, tokens_BT = original.model, original.sample
    config = bridge_config(model)
    expected = {"tokens": tokens_BT, "logits": model(tokens_BT).logits.contiguous()}
    values = {
        "tolerance": f"{FLOAT32_TOLERANCE:.0e}",
        "origin": original.origin,
        "length": tokens_BT.shape[1],
        "start": [] if original.tokenizer.start_id is None else [original.tokenizer.start_id],
        "vocab_size": model.vocab_size,
        "tokens": " ".join(map(str, tokens_BT[0].tolist())),
    }
    for name, data in {
        "model.safetensors": safetensors.torch.save(bridge_weights(model), {"format": "pt"}),
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "tokenizer.json": original.tokenizer.to_json().encode(),
        "expected.safetensors": safetensors.torch.save(expected),
        **{name: render(f"transformer_lens/{name}", **values) for name in ("load.py", "README.md")},
    }.items():
        DISK.write(folder / name, data)


def check(folder: Path, original: Original) -> Iterator[Receipt | str]:
    """Compare logits, by the library's equations and, if it is installed, by the library itself."""
    yield check_by_equations(folder, original.model)
    yield check_by_loading(folder) or "transformer-lens is not installed; skipped the check by the library itself"


@torch.inference_mode()
def check_by_equations(folder: Path, model: Transformer) -> Receipt:
    """Compare what TransformerLens's equations give for the folder's config and weights with the model, in float64."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    tokens_BT = safetensors.torch.load_file(folder / "expected.safetensors")["tokens"]
    found_BTVocab, expected_BTVocab = (
        bridge_logits(config, weights, tokens_BT),
        deepcopy(model).double()(tokens_BT).logits,
    )
    check = "the folder's weights give the model's logits (float64)"
    return Receipt(check, relative_error(found_BTVocab, expected_BTVocab), FLOAT64_TOLERANCE)


def check_by_loading(folder: Path) -> Receipt | None:
    """Run `load.py` in a new process; None if TransformerLens is missing or too old.

    Raises:
        FailedCheckError: it cannot boot the model.
    """
    version = installed_version()
    if version is None or int(version.partition(".")[0]) < FIRST_VERSION:
        return None
    # -B: no bytecode, which would be part of the folder.
    command = [sys.executable, "-B", "-c", "import load; print(load.difference())"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        raise FailedCheckError(
            f"TransformerLens {version} cannot boot the model: {shortened(reason.strip())}; nothing was written",
            f"Lumiere is tested with 4.3: {install_command('transformer-lens>=4.3,<5')}",
        )
    error = float(done.stdout.split()[-1])  # after what TransformerLens prints
    return Receipt(f"the same logits in TransformerLens {version} (float32)", error, FLOAT32_TOLERANCE)


def installed_version() -> str | None:
    """Return the version of TransformerLens without importing it; None if it is not installed."""
    try:
        return metadata.version("transformer-lens")
    except metadata.PackageNotFoundError:
        return None
