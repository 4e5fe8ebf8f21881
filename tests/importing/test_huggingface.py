"""Models of `transformers` with random weights, saved, opened here, and compared with what they computed there."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from lumiere.components.layers import rotation_at
from lumiere.errors import LumiereError
from lumiere.importing.architectures import read_architecture
from lumiere.importing.huggingface import open_model
from lumiere.models.transformer import Transformer

LLAMA = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-3,
}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32, "layer_norm_epsilon": 1e-3}
NEOX = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 32, "layer_norm_eps": 1e-3,
}  # fmt: skip
NEO = {
    "vocab_size": 50, "hidden_size": 24, "num_layers": 4, "num_heads": 3, "max_position_embeddings": 32,
    "window_size": 5, "attention_types": [[["global", "local"], 2]],
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
# Of the wavelengths 6, 35, 199 and 1,117 the first stays, the second is between, and two are four times as long.
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 60,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA | ROTATED),
    "llama, tied, wide heads": ("Llama", LLAMA | {"tie_word_embeddings": True, "head_dim": 10}),
    "llama, biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama, some biases": ("Llama", LLAMA | {"attention_bias": True}),
    "llama, scaled": ("Llama", LLAMA | {"head_dim": 8, "rope_parameters": LLAMA3 | {"rope_theta": 1000.0}}),
    "llama, stretched": ("Llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "gpt neox, stretched": (
        "GPTNeoX",
        NEOX | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
    ),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 4}),
    "mistral, whole": ("Mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", LLAMA | WINDOWS),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "qwen3, windows, biases": ("Qwen3", LLAMA | WINDOWS | {"head_dim": 8, "attention_bias": True}),
    "olmo": ("Olmo", {name: value for name, value in LLAMA.items() if name != "rms_norm_eps"}),
    "gpt2": ("GPT2", GPT2),
    "gpt2, relu, narrow": ("GPT2", GPT2 | {"activation_function": "relu", "n_inner": 30}),
    "gpt2, untied": ("GPT2", GPT2 | {"activation_function": "gelu", "tie_word_embeddings": False}),
    "gpt neox": ("GPTNeoX", NEOX),
    "gpt neox, sequential": ("GPTNeoX", NEOX | {"use_parallel_residual": False, "attention_bias": False}),
    "gpt neo": ("GPTNeo", NEO),
}
NAMES = {"GPT2": "GPT2LMHeadModel"}


def save(kind: str, values: dict[str, Any], folder: Path, **options: Any) -> Any:
    """Save a model of `transformers` with weights in which every part matters; return it."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**values)
    config._attn_implementation = "eager"
    model = getattr(transformers, NAMES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(float(parameter.ndim == 1))
    model.save_pretrained(folder, **options)
    return model


def tokens() -> Tensor:
    return torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "values"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(kind: str, values: dict[str, Any], tmp_path: Path) -> None:
    theirs = save(kind, values, tmp_path).double()(tokens()).logits
    ours = open_model(tmp_path).double().logits(tokens())
    # Their norms and rotations compute in float32 whatever the model's type.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_config_of_llama_3_2_1b() -> None:
    """As Meta publishes it, without the weights."""
    scaling = {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": scaling, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
        "use_cache": True, "vocab_size": 128256,
    }  # fmt: skip
    found = read_architecture(config)
    with torch.device("meta"):
        model = Transformer(found.vocab_size, **found.settings.model_dump())
    assert model.num_parameters == 1_235_814_400
    cos, sin = rotation_at(torch.tensor([1]), found.settings, torch.float64)
    frequencies = torch.atan2(sin, cos)[0, 0, :32]
    theirs = transformers.LlamaConfig(**config)
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs)
    torch.testing.assert_close(frequencies, expected.double(), rtol=1e-5, atol=0)
    assert (expected < 2e-7).any()


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@torch.no_grad()
def test_several_files_and_the_keys_of_older_versions(tmp_path: Path) -> None:
    save("GPTNeoX", NEOX, tmp_path / "one")
    expected = open_model(tmp_path / "one").logits(tokens())
    save("GPTNeoX", NEOX, tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    values = json.loads((tmp_path / "many/config.json").read_text())
    del values["rope_parameters"]
    (tmp_path / "many/config.json").write_text(json.dumps(values | {"rotary_pct": 0.25, "rotary_emb_base": 10000}))
    assert torch.equal(open_model(tmp_path / "many").logits(tokens()), expected)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),  # against rope_parameters
        ({"rope_parameters": LLAMA3 | {"beta_fast": 32}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "linear"}}, "without factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rotary_scaling.factor"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 8.0}}, "high_frequency_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "cannot be"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "num_key_value_heads"),
        ({"rope_parameters": {"rope_theta": [1]}}, "rotary_base"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_hidden_layers": 10**9}, "num_layers"),
        ({"num_hidden_layers": 4}, "layers.3"),
        ({"num_hidden_layers": 2}, "layers.2"),
        ({"intermediate_size": 41}, "gate_proj"),
    ],
)
def test_what_cannot_be_computed_is_named(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    save("Llama", LLAMA, tmp_path)
    change(tmp_path, **values)
    with pytest.raises(LumiereError) as caught:
        open_model(tmp_path)
    assert named in caught.value.message


def test_files_that_are_refused(tmp_path: Path) -> None:
    save("Llama", LLAMA, tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    safetensors.torch.save_file(tensors | {name: tensors[name].to(torch.int8)}, weights)
    with pytest.raises(LumiereError, match=r"torch\.int8"):
        open_model(tmp_path)
    safetensors.torch.save_file(tensors | {"adapter.weight": tensors[name].clone()}, weights)
    with pytest.raises(LumiereError, match=r"adapter\.weight"):
        open_model(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(LumiereError, match="damaged"):
        open_model(tmp_path)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LumiereError) as caught:
        open_model(tmp_path)
    assert "pytorch_model.bin" in (caught.value.hint or "")
    index = {"weight_map": {name: "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LumiereError, match=r"\.\./model\.safetensors"):
        open_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(LumiereError, match="config"):
        open_model(tmp_path)
