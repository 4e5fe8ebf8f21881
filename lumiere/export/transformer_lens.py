"""Models for TransformerLens, in the form that `TransformerBridge.boot_native` builds (version 4.3).

Shapes: B batch, T position, E embedding_size, H head, K d_key, F d_ff, Vocab vocab_size.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lumiere.errors import FailedCheckError, LumiereError, shortened
from lumiere.export.original import FLOAT32_TOLERANCE, Original, render
from lumiere.files import DISK
from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, relative_error
from lumiere.models.transformer import Transformer
from lumiere.programs import install_command

OURS_TO_THEIRS = {
    "attention_norm": "ln1",
    "attention.query": "attn.q",
    "attention.key": "attn.k",
    "attention.value": "attn.v",
    "attention.output": "attn.o",
    "feedforward_norm": "ln2",
    "feedforward.gate": "mlp.gate",
    "feedforward.up": "mlp.in",
    "feedforward.down": "mlp.out",
}
"""Parts of a block that have weights."""
HELD = {
    "norm": ("rms",),
    "feedforward": ("swiglu",),
    "positions": ("learned", "rotary"),
    "rotary_fraction": (1.0,),
    "rotary_scaling": (None,),
    "attention_windows": (None,),
    "attention_scale": (None,),
    "num_key_value_heads": (None,),
    "bias": ("none",),
    "parallel_blocks": (False,),
    "query_key_norm": (False,),
}
"""The model settings that an export to TransformerLens can hold, where it cannot hold all values."""


def bridge_config(model: Transformer) -> dict[str, Any]:
    """Return the arguments of `TransformerBridgeConfig`.

    Raises:
        LumiereError: the model's keys and values differ in width, or a setting has a value that the export lacks.
    """
    settings = model.settings
    for name, values in HELD.items():
        if (value := settings.model_dump()[name]) not in values:
            raise LumiereError(
                f"the model has {name} {value!r}, which an export to transformer-lens does not hold",
                f"it holds model.{name} {' or '.join(map(str, values))}",
            )
    if model.d_key != model.d_value:
        raise LumiereError(
            f"the heads have d_key {model.d_key} and d_value {model.d_value}; TransformerLens has one width for both",
            "train with model.d_key equal to model.d_value",
        )
    rotary = {"rotary_dim": model.d_key, "rotary_base": settings.rotary_base} if settings.rotary_size else {}
    return {
        "model_name": "lumiere",
        "n_layers": model.num_layers,
        "d_model": model.embedding_size,
        "n_ctx": model.context_size,
        "d_vocab": model.vocab_size,
        "n_heads": model.num_heads,
        "d_head": model.d_key,
        "d_mlp": model.d_ff,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "eps": settings.norm_epsilon,
        "positional_embedding_type": "rotary" if rotary else "standard",
        **rotary,
    }


def bridge_weights(model: Transformer) -> dict[str, Tensor]:
    """Return the weights by the names of `TransformerBridge.state_dict()`; a tied output head is a copy."""
    weights = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    embedding = weights["token_embedding.weight"]
    theirs = {"embed.weight": embedding, "unembed.weight": model.unembedding.detach().cpu().clone()}
    theirs["unembed.bias"] = torch.zeros(model.vocab_size, dtype=embedding.dtype)
    if model.position_embedding is not None:
        theirs["pos_embed.weight"] = weights["position_embedding.weight"]
    for layer in range(model.num_layers):
        for ours, name in OURS_TO_THEIRS.items():
            weight = weights[f"blocks.{layer}.{ours}.weight"]
            if name in ("attn.q", "attn.k") and model.settings.rotary_size:
                weight = neighboring_pairs(weight, model.num_heads)
            theirs[f"blocks.{layer}.{name}.weight"] = weight
            if name.startswith("attn."):  # theirs have biases, ours none
                theirs[f"blocks.{layer}.{name}.bias"] = torch.zeros(len(weight), dtype=weight.dtype)
    theirs["ln_final.weight"] = weights["final_norm.weight"]
    return {name: weight.contiguous() for name, weight in theirs.items()}


def neighboring_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder rows of queries or keys from our rotary pairs, (i, i + d_key/2), to theirs, which are neighbors.

    Scores do not change, since queries and keys are reordered alike.
    """
    first_HKE, second_HKE = weight.unflatten(0, (num_heads, -1)).chunk(2, dim=1)
    return torch.stack([first_HKE, second_HKE], dim=2).flatten(0, 2)


@torch.inference_mode()
def bridge_logits(config: dict[str, Any], weights: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    """Compute the logits of TransformerLens's `NativeModel` from its equations, in float64: (B, T, Vocab).

    Shares no code with Lumiere's model, so that exports are checked without TransformerLens.
    """
    w = {name: weight.double() for name, weight in weights.items()}
    length, heads = tokens_BT.shape[1], (config["n_heads"], config["d_head"])
    hidden_TT = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x_BTE: Tensor, name: str) -> Tensor:
        return x_BTE / (x_BTE.pow(2).mean(-1, keepdim=True) + config["eps"]).sqrt() * w[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    resid_BTE = w["embed.weight"][tokens_BT]
    rotates = config["positional_embedding_type"] == "rotary"
    if not rotates:
        resid_BTE = resid_BTE + w["pos_embed.weight"][:length]
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}"
        x_BTE = norm(resid_BTE, f"{block}.ln1")
        q, k, v = (linear(x_BTE, f"{block}.attn.{part}").unflatten(-1, heads).transpose(1, 2) for part in "qkv")
        if rotates:
            q, k = (rotated(x, config["rotary_base"]) for x in (q, k))
        scores_BHTT = (q @ k.transpose(-1, -2) / config["d_head"] ** 0.5).masked_fill(hidden_TT, -torch.inf)
        z = (scores_BHTT.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        resid_BTE = resid_BTE + linear(z, f"{block}.attn.o")
        x_BTE = norm(resid_BTE, f"{block}.ln2")
        gate_BTF = linear(x_BTE, f"{block}.mlp.gate")
        neurons_BTF = gate_BTF * gate_BTF.sigmoid() * linear(x_BTE, f"{block}.mlp.in")
        resid_BTE = resid_BTE + linear(neurons_BTF, f"{block}.mlp.out")
    return linear(norm(resid_BTE, "ln_final"), "unembed")


def rotated(x_BHTK: Tensor, base: float) -> Tensor:
    """RoPE on neighboring pairs, as products of complex numbers."""
    length, width = x_BHTK.shape[-2:]
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles_TP = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    turns_TP = torch.polar(torch.ones_like(angles_TP), angles_TP)
    return torch.view_as_real(torch.view_as_complex(x_BHTK.unflatten(-1, (-1, 2)).contiguous()) * turns_TP).flatten(-2)


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
