"""A model in TransformerLens's form: what `TransformerBridge.boot_native` builds (version 4.3).

Shapes: B batch, T position, E embedding_size, H head, K d_key, F d_ff, Vocab vocab_size.
"""

from typing import Any

import torch
from torch import Tensor

from lumiere.components.kernels import EPSILON
from lumiere.components.layers import ROTARY_BASE
from lumiere.errors import LumiereError
from lumiere.models.transformer import Transformer

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
"""The parts of a block that have weights."""


def bridge_config(model: Transformer) -> dict[str, Any]:
    """The arguments of `TransformerBridgeConfig`.

    Raises:
        LumiereError: the model's keys and values differ in width.
    """
    if model.d_key != model.d_value:
        raise LumiereError(
            f"the heads have d_key {model.d_key} and d_value {model.d_value}; TransformerLens has one width for both",
            "it takes models with model.d_key equal to model.d_value",
        )
    config = {
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
        "eps": EPSILON,
        "positional_embedding_type": "standard",
    }
    if model.positions == "rotary":
        rotary = {"rotary_dim": model.d_key, "rotary_base": round(ROTARY_BASE)}
        config |= {"positional_embedding_type": "rotary", **rotary}
    return config


def bridge_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights by the names of `TransformerBridge.state_dict()`; the tied output head is a copy."""
    weights = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    embedding = weights["token_embedding.weight"]
    theirs = {"embed.weight": embedding, "unembed.weight": embedding.clone()}
    theirs["unembed.bias"] = torch.zeros(model.vocab_size, dtype=embedding.dtype)
    if model.positions == "learned":
        theirs["pos_embed.weight"] = weights["position_embedding.weight"]
    for layer in range(model.num_layers):
        for ours, name in OURS_TO_THEIRS.items():
            weight = weights[f"blocks.{layer}.{ours}.weight"]
            if name in ("attn.q", "attn.k") and model.positions == "rotary":
                weight = neighbouring_pairs(weight, model.num_heads)
            theirs[f"blocks.{layer}.{name}.weight"] = weight
            if name.startswith("attn."):  # theirs have biases, ours none
                theirs[f"blocks.{layer}.{name}.bias"] = torch.zeros(len(weight), dtype=weight.dtype)
    theirs["ln_final.weight"] = weights["final_norm.weight"]
    return {name: weight.contiguous() for name, weight in theirs.items()}


def neighbouring_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of queries or keys in the order of TransformerLens, whose rotary pairs are neighbours.

    Ours are (i, i + d_key/2). The same order in queries and keys leaves every score as it is.
    """
    first_HKE, second_HKE = weight.unflatten(0, (num_heads, -1)).chunk(2, dim=1)
    return torch.stack([first_HKE, second_HKE], dim=2).flatten(0, 2)


@torch.inference_mode()
def bridge_logits(config: dict[str, Any], weights: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    """What TransformerLens computes from a config and weights, in float64: (B, T, Vocab).

    Written from the equations of its `NativeModel`, with nothing of Lumiere's model, so that an export can be checked
    where TransformerLens is not installed.
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
    """RoPE on neighbouring pairs, as products of complex numbers."""
    length, width = x_BHTK.shape[-2:]
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles_TP = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    turns_TP = torch.polar(torch.ones_like(angles_TP), angles_TP)
    return torch.view_as_real(torch.view_as_complex(x_BHTK.unflatten(-1, (-1, 2)).contiguous()) * turns_TP).flatten(-2)
