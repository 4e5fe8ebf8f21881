"""State dicts of nanoGPT and TransformerLens, opened and compared with models written here from their equations."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumiere.errors import LumiereError
from lumiere.importing.huggingface import open_model
from lumiere.importing.source import open_source
from tests.cli.commands import invoke, read_json, refuse
from tests.data.foreign import byte_level
from tests.importing.test_huggingface import tokens

NANO = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 32, "vocab_size": 50, "bias": True, "dropout": 0.1}


class LayerNorm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        width, self.num_heads = values["n_embd"], values["n_head"]
        self.c_attn = nn.Linear(width, 3 * width, bias=values["bias"])
        self.c_proj = nn.Linear(width, width, bias=values["bias"])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        width = values["n_embd"]
        self.c_fc = nn.Linear(width, 4 * width, bias=values["bias"])
        self.c_proj = nn.Linear(4 * width, width, bias=values["bias"])
        self.form = "tanh" if values.get("activation_function") == "gelu_new" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.form))


class Block(nn.Module):
    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (LayerNorm(values["n_embd"], values["bias"]) for _ in range(2))
        self.attn, self.mlp = Attention(values), MLP(values)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT's `GPT` without dropout, by its names; every weight has an effect."""

    def __init__(self, values: dict[str, Any], is_tied: bool = True) -> None:
        super().__init__()
        width = values["n_embd"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(values["vocab_size"], width),
                "wpe": nn.Embedding(values["block_size"], width),
                "h": nn.ModuleList(Block(values) for _ in range(values["n_layer"])),
                "ln_f": LayerNorm(width, values["bias"]),
            }
        )
        self.lm_head = nn.Linear(width, values["vocab_size"], bias=False)
        if is_tied:
            self.transformer["wte"].weight = self.lm_head.weight
        torch.manual_seed(1)
        for parameter in self.parameters():
            parameter.data.normal_(std=0.3).add_(float(parameter.ndim == 1))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(idx.shape[1]))
        for block in self.transformer["h"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def write(folder: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(copies, folder / "model.safetensors")


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"activation_function": "gelu_new"}])
@torch.no_grad()
def test_logits_are_those_of_nanogpt(changes: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    theirs = NanoGPT(NANO | changes)
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()}  # of torch 1
    tensors = theirs.state_dict() | masks
    write(tmp_path, NANO | changes, {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    ours = open_model(tmp_path).double()
    assert ours.settings.tie_embeddings
    torch.testing.assert_close(ours.logits(tokens()), theirs.double()(tokens()), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_heads_that_are_not_tied_and_tied_ones_under_one_name(tmp_path: Path) -> None:
    theirs = NanoGPT(NANO, is_tied=False)
    write(tmp_path / "untied", NANO, theirs.state_dict())
    found = open_model(tmp_path / "untied").double().logits(tokens())
    torch.testing.assert_close(found, theirs.double()(tokens()), rtol=1e-9, atol=1e-9)
    theirs = NanoGPT(NANO)
    write(tmp_path / "tied", NANO, {})
    safetensors.torch.save_model(theirs, str(tmp_path / "tied/model.safetensors"))
    assert "transformer.wte.weight" not in safetensors.torch.load_file(tmp_path / "tied/model.safetensors")
    found = open_model(tmp_path / "tied").double().logits(tokens())
    torch.testing.assert_close(found, theirs.double()(tokens()), rtol=1e-9, atol=1e-9)


LENS = {"n_layers": 2, "d_model": 24, "n_ctx": 32, "d_head": 6, "n_heads": 4, "d_vocab": 50, "d_mlp": 40, "eps": 1e-3}
BANDS = {"NTK_by_parts_factor": 4.0, "NTK_original_ctx_len": 60}
ROTARY = {"positional_embedding_type": "rotary"}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN", "attn_scale": math.sqrt(6)},
    "llama": ROTARY | {"act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "n_key_value_heads": 2}
    | {"rotary_dim": 4, "final_rms": True, "use_qk_norm": True},
    "llama 3": ROTARY | {"act_fn": "gelu", "gated_mlp": True, "normalization_type": "RMS", "rotary_base": 1000}
    | {"use_NTK_by_parts_rope": True, **BANDS},
    "attention only": {"attn_only": True, "normalization_type": None, "use_attn_scale": False},
    "folded": {"act_fn": "relu", "normalization_type": "LNPre", "parallel_attn_mlp": True},
    "folded rms": ROTARY | {"act_fn": "gelu_fast", "normalization_type": "RMSPre", "rotary_scaling_factor": 3.0},
    "windows": {"act_fn": "gelu", "use_local_attn": True, "window_size": 5, "attn_types": ["global", "local"]}
    | {"attn_scale": 2.0},
}  # fmt: skip
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "relu": F.relu,
}


def lens_tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights by the names of a `HookedTransformer`, with its buffers; biases that ours lacks are zero."""
    width, head, heads, ff = values["d_model"], values["d_head"], values["n_heads"], values["d_mlp"]
    groups, bar = values.get("n_key_value_heads", heads), "_" if "n_key_value_heads" in values else ""
    norm = values.get("normalization_type", "LN")
    gains = {"LN": {"w": (width,), "b": (width,)}, "RMS": {"w": (width,)}}.get(norm or "", {})
    rotates, gated = "rotary" in values.values(), values.get("gated_mlp", False)
    shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (50, width), "unembed.W_U": (width, 50), "unembed.b_U": (50,)}
    shapes |= {} if rotates else {"pos_embed.W_pos": (values["n_ctx"], width)}
    shapes |= {f"ln_final.{name}": shape for name, shape in gains.items()}
    for layer in range(values["n_layers"]):
        block = f"blocks.{layer}"
        parts = ("ln1",) if values.get("attn_only") else ("ln1", "ln2")
        shapes |= {f"{block}.{part}.{name}": shape for part in parts for name, shape in gains.items()}
        for name, count in (("Q", heads), (f"{bar}K", groups), (f"{bar}V", groups)):
            name, mark = name[-1], name[:-1]
            shapes |= {
                f"{block}.attn.{mark}W_{name}": (count, width, head),
                f"{block}.attn.{mark}b_{name}": (count, head),
            }
        shapes |= {f"{block}.attn.W_O": (heads, head, width), f"{block}.attn.b_O": (width,)}
        if values.get("use_qk_norm"):
            shapes |= {f"{block}.attn.q_norm.w": (head,), f"{block}.attn.k_norm.w": (head,)}
        if not values.get("attn_only"):
            shapes |= {f"{block}.mlp.W_in": (width, ff), f"{block}.mlp.b_in": (ff,)}
            shapes |= {f"{block}.mlp.W_out": (ff, width), f"{block}.mlp.b_out": (width,)}
            shapes |= {f"{block}.mlp.W_gate": (width, ff)} if gated else {}
    generator = torch.Generator().manual_seed(2)
    found = {
        name: torch.randn(shape, generator=generator) * 0.3 + name.endswith(".w") for name, shape in shapes.items()
    }
    zero = ("b_U", "mlp.b_in") if gated else ("b_U",)
    return {name: tensor * (not name.endswith(zero)) for name, tensor in found.items()}


def lens_logits(values: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Compute what a `HookedTransformer` does, by its documentation, in float64; heads stay an axis."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    length, kind, bar = (
        ids.shape[1],
        values.get("normalization_type", "LN"),
        "_" if "n_key_value_heads" in values else "",
    )

    def norm(x: Tensor, name: str) -> Tensor:
        if kind is None:
            return x
        x = x - x.mean(-1, keepdim=True) if kind.startswith("LN") else x
        x = x / (x.square().mean(-1, keepdim=True) + values["eps"]).sqrt()
        return x * w.get(f"{name}.w", torch.ones(())) + w.get(f"{name}.b", torch.zeros(()))

    def turned(x: Tensor) -> Tensor:
        size = values.get("rotary_dim", values["d_head"])
        inverse = values.get("rotary_base", 10_000) ** (-torch.arange(0, size, 2).double() / size)
        inverse = inverse / values.get("rotary_scaling_factor", 1.0)
        if values.get("use_NTK_by_parts_rope"):
            factor, length_before = values["NTK_by_parts_factor"], values["NTK_original_ctx_len"]
            turns = length_before * inverse / (2 * math.pi)
            share = ((turns - 1) / (4 - 1)).clamp(0, 1)
            inverse = (1 - share) * inverse / factor + share * inverse
        angles = (torch.arange(length).double()[:, None] * inverse)[:, None]
        a, b, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], dim=-1)

    x = w["embed.W_E"][ids]
    if "rotary" not in values.values():
        x = x + w["pos_embed.W_pos"][:length]
    for layer in range(values["n_layers"]):
        block, attn = f"blocks.{layer}", f"blocks.{layer}.attn"
        normal = norm(x, f"{block}.ln1")
        q, k, v = (
            torch.einsum("bte,hek->bthk", normal, w[f"{attn}.{mark}W_{name}"]) + w[f"{attn}.{mark}b_{name}"]
            for name, mark in (("Q", ""), ("K", bar), ("V", bar))
        )
        if values.get("use_qk_norm"):
            q, k = norm(q, f"{attn}.q_norm"), norm(k, f"{attn}.k_norm")
        if "rotary" in values.values():
            q, k = turned(q), turned(k)
        k, v = (part.repeat_interleave(values["n_heads"] // part.shape[2], dim=2) for part in (k, v))
        divisor = values.get("attn_scale", math.sqrt(values["d_head"])) if values.get("use_attn_scale", True) else 1.0
        distance = torch.arange(length)[:, None] - torch.arange(length)
        is_seen = distance >= 0
        if values.get("use_local_attn") and values["attn_types"][layer] == "local":
            is_seen &= distance < values["window_size"]
        scores = (torch.einsum("bthk,bshk->bhts", q, k) / divisor).masked_fill(~is_seen, -torch.inf)
        z = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)
        written = torch.einsum("bthk,hke->bte", z, w[f"{attn}.W_O"]) + w[f"{attn}.b_O"]
        middle = x if values.get("parallel_attn_mlp") else x + written
        if not values.get("attn_only"):
            normal, activation = norm(middle, f"{block}.ln2"), ACTIVATIONS[values["act_fn"]]
            neurons = normal @ w[f"{block}.mlp.W_in"]
            if values.get("gated_mlp"):
                neurons = activation(normal @ w[f"{block}.mlp.W_gate"]) * neurons + w[f"{block}.mlp.b_in"]
            else:
                neurons = activation(neurons + w[f"{block}.mlp.b_in"])
            written = written + neurons @ w[f"{block}.mlp.W_out"] + w[f"{block}.mlp.b_out"]
        x = x + written
    return norm(x, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_a_hooked_transformer(kind: str, tmp_path: Path) -> None:
    values = LENS | KINDS[kind]
    tensors = lens_tensors(values)
    buffers = {"mask": torch.empty(0, 0, dtype=torch.bool), "IGNORE": torch.tensor(-torch.inf)}
    write(tmp_path, values, tensors | {f"blocks.0.attn.{name}": tensor for name, tensor in buffers.items()})
    found = open_model(tmp_path).double().logits(tokens())
    torch.testing.assert_close(found, lens_logits(values, tensors, tokens()), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformer_lens") is None, reason="pip install transformer-lens")
@torch.no_grad()
def test_the_equations_are_those_of_transformer_lens(tmp_path: Path) -> None:
    """Version 4 has no `HookedTransformer`, but its bridge has the weights in the same form."""
    from transformer_lens.config import TransformerBridgeConfig  # pyright: ignore[reportMissingImports]
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]

    values: dict[str, Any] = LENS | {"act_fn": "gelu_new", "normalization_type": "LN"}
    bridge: Any = TransformerBridge
    theirs = bridge.boot_native(TransformerBridgeConfig(**values, model_name="x"))
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3).add_(float(parameter.ndim == 1))
    tensors = {"embed.W_E": theirs.W_E, "pos_embed.W_pos": theirs.W_pos, "unembed.W_U": theirs.W_U}
    names = ("attn.W_Q", "attn.b_Q", "attn.W_K", "attn.b_K", "attn.W_V", "attn.b_V", "attn.W_O", "attn.b_O")
    for name in (*names, "mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out"):
        tensors |= {f"blocks.{layer}.{name}": getattr(theirs, name.split(".")[1])[layer] for layer in range(2)}
    norms = {"ln_final": theirs.ln_final}
    norms |= {
        f"blocks.{layer}.{name}": getattr(theirs.blocks[layer], name) for layer in range(2) for name in ("ln1", "ln2")
    }
    tensors |= {f"{name}.w": norm.weight for name, norm in norms.items()}
    tensors |= {f"{name}.b": norm.bias for name, norm in norms.items()}
    theirs.unembed.bias.zero_()
    write(tmp_path, values, tensors)
    torch.testing.assert_close(open_model(tmp_path).logits(tokens()), theirs(tokens()), rtol=1e-4, atol=1e-4)


def test_zero_biases_are_left_out(tmp_path: Path) -> None:
    values = LENS | KINDS["gpt2"]
    tensors = lens_tensors(values)
    for kind, ends in (("qkv", ("b_O", "b_in", "b_out")), ("none", ("b_Q", "b_K", "b_V"))):
        tensors |= {name: tensor * 0 for name, tensor in tensors.items() if name.endswith(ends)}
        write(tmp_path, values, tensors)
        assert open_model(tmp_path).settings.bias == kind


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"act_fn": "solu_ln"}, "act_fn solu_ln"),
    ({"gated_mlp": True}, "act_fn gelu_new"),
    ({"normalization_type": "L2"}, "normalization_type L2"),
    ({"normalization_type": "LNPre", "final_rms": True}, "final_rms True"),
    ({"positional_embedding_type": "shortformer"}, "positional_embedding_type shortformer"),
    ({"attention_dir": "bidirectional"}, "attention_dir bidirectional"),
    ({"d_vocab_out": 3}, "d_vocab_out 3"),
    ({"attn_scores_soft_cap": 50.0}, "attn_scores_soft_cap 50.0"),
    ({"rotary_adjacent_pairs": True}, "rotary_adjacent_pairs True"),
    ({"original_architecture": "Olmo2ForCausalLM"}, "original_architecture Olmo2ForCausalLM"),
    ({"use_local_attn": True, "window_size": 4, "attn_types": ["global"]}, "attn_types"),
    ({"use_new_idea": True}, "use_new_idea"),
    ({"n_layers": "2"}, "n_layers 2"),
    ({"n_layers": None}, "n_layers"),
    ({"d_head": 0}, "cannot be"),
    ({"attn_scale": "a"}, "cannot be"),
    ({"n_heads": 5}, "blocks.0.attn.W_Q"),
    ({"n_layers": 3}, "blocks.2.ln1.w"),
    ({"attn_only": True}, "blocks.0.ln2"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_settings_of_transformer_lens_without_a_counterpart(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    values = LENS | KINDS["gpt2"]
    write(tmp_path, values | changes, lens_tensors(values))
    with pytest.raises(LumiereError) as caught:
        open_model(tmp_path)
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("kind", "name"), [("folded", "unembed.b_U"), ("llama", "blocks.1.mlp.b_in"), ("gpt2", "blocks.0.attn.extra")]
)
def test_tensors_of_transformer_lens_without_a_counterpart(kind: str, name: str, tmp_path: Path) -> None:
    tensors = lens_tensors(LENS | KINDS[kind])
    tensors[name] = torch.full_like(tensors.get(name, torch.zeros(3)), 0.1)
    write(tmp_path, LENS | KINDS[kind], tensors)
    with pytest.raises(LumiereError, match=name):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bias": False}, "attn.c_attn.bias"),
        ({"bias": "yes"}, "bias yes"),
        ({"block_size": 16}, "wpe.weight"),
        ({"n_head": 5}, "c_attn.weight"),
        ({"n_head": None}, "n_head"),
        ({"rotary": True}, "rotary"),
    ],
)
def test_settings_of_nanogpt_without_a_counterpart(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    write(tmp_path, NANO | changes, NanoGPT(NANO).state_dict())
    with pytest.raises(LumiereError) as caught:
        open_model(tmp_path)
    assert named in caught.value.message


def test_tensors_of_nanogpt_without_a_counterpart(tmp_path: Path) -> None:
    tensors = NanoGPT(NANO).state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    for change, named in (
        ({f"_orig_mod.{name}": tensors[name]}, "twice"),
        ({name: tensors[name][None]}, "c_attn.weight"),
        ({"transformer.h.0.attn.c_attn.bias": torch.ones(72, dtype=torch.int8)}, "int8"),
        ({"transformer.h.0.attn.gate.weight": tensors[name]}, "gate.weight"),
    ):
        write(tmp_path, NANO, tensors | change)
        with pytest.raises(LumiereError, match=named):
            open_model(tmp_path)


@pytest.mark.slow
def test_a_state_dict_of_nanogpt_is_gpt2_in_transformers(tmp_path: Path) -> None:
    """The export compares log-probabilities."""
    values, flags = NANO | {"vocab_size": 420, "block_size": 64}, ("--runs-dir", str(tmp_path / "runs"))
    write(tmp_path / "nano", values, NanoGPT(values).state_dict())
    byte_level().save(str(tmp_path / "nano/tokenizer.json"))
    invoke("import", str(tmp_path / "nano"), *flags)
    invoke("export", "latest", str(tmp_path / "out"), "--to", "hf", *flags)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "gpt2"


def test_a_run_of_a_state_dict(tmp_path: Path) -> None:
    """From its file or its folder; what is missing beside it is named with the way out."""
    values, runs = NANO | {"vocab_size": 420, "block_size": 64}, tmp_path / "runs"
    source, flags = tmp_path / "nano", ("--runs-dir", str(tmp_path / "runs"))
    write(source, values, NanoGPT(values).state_dict())
    file = source / "model.safetensors"
    refuse("import", str(file), *flags)  # no tokenizer
    byte_level().save(str(source / "tokenizer.json"))
    for place in (source, file):
        found = read_json("import", str(place), *flags)
        assert found["source"]["model_type"] == "nanogpt"
        assert set(found["source"]["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert all(receipt["holds"] for receipt in read_json("inspect", "lens", "--prompt", "Once", *flags)["receipts"])
    (source / "ckpt.pt").touch()
    with pytest.raises(LumiereError, match="pickle"):
        open_source(str(source / "ckpt.pt"))
    (source / "config.json").unlink()
    with pytest.raises(LumiereError, match=r"config\.json") as caught:
        open_source(str(source))
    assert "model_args" in (caught.value.hint or "")
    assert len(list(runs.glob("run_*"))) == 2
