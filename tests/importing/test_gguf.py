"""A GGUF file with the weights of a Llama of `transformers`, opened and compared with it."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from lumiere.components.layers import rotation_at
from lumiere.config.schema import RotaryScaling
from lumiere.errors import LumiereError
from lumiere.importing.gguf import open_model
from tests.importing.test_huggingface import LLAMA, save, tokens

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 96}  # blocks of 32 numbers are quantized together


def write(path: Path, model: Any, quantized: Any = None, **changes: Any) -> None:
    """Write a model as llama.cpp's converter does: queries and keys in neighboring pairs."""
    config, writer = model.config, gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if (factors := changes.pop("factors", None)) is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    for name, value in changes.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{name}", value)
        else:
            writer.add_float32(f"llama.{name}", value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if quantized is not None and rows.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(rows, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("is_tied", [False, True])
@torch.no_grad()
def test_logits_are_those_of_transformers(is_tied: bool, path: Path, tmp_path: Path) -> None:
    theirs = save("Llama", LLAMA | {"tie_word_embeddings": is_tied}, tmp_path)
    write(path, theirs)
    ours = open_model(path)
    assert ours.settings.norm_epsilon == LLAMA["rms_norm_eps"]
    torch.testing.assert_close(ours.logits(tokens()), theirs(tokens()).logits, rtol=1e-5, atol=1e-4)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = LLAMA | {"head_dim": 64, "max_position_embeddings": 20_000}


def factors_of(parameters: dict[str, Any], size: int) -> list[float]:
    """What llama.cpp's converter writes for Llama 3.1, in float32 and pair by pair."""
    frequencies = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context, found = parameters["original_max_position_embeddings"], []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(parameters["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(float(1 / ((1 - smooth) / parameters["factor"] + smooth)))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"low_freq_factor": 2.0, "high_freq_factor": 3.0},
        {"original_max_position_embeddings": 1000},
        {"low_freq_factor": 1.0, "high_freq_factor": 1.3},  # one pair is between the bands
        {"low_freq_factor": 1.0, "high_freq_factor": 1.1},  # none is
    ],
)
@torch.no_grad()
def test_factors_of_llama_3(changes: dict[str, Any], path: Path, tmp_path: Path) -> None:
    """Also at positions far from the start, where a wrong frequency would have turned queries elsewhere."""
    parameters = LLAMA3 | changes
    theirs = save("Llama", LONG | {"rope_parameters": parameters}, tmp_path)
    write(path, theirs, factors=factors_of(parameters, 64), **{"attention.key_length": 64.0})
    ours = open_model(path)
    cos, sin = rotation_at(torch.tensor([1]), ours.settings, torch.float64)
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs.config)
    torch.testing.assert_close(torch.atan2(sin, cos)[0, 0, :32], expected.double(), rtol=3e-5, atol=0)
    torch.testing.assert_close(ours.logits(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4)
    if not changes:
        assert ours.settings.rotary_scaling == RotaryScaling(type="llama3", factor=32.0, original_context_size=8192)


@pytest.mark.parametrize(("keys", "factor"), [("scaling.factor", 3.0), ("scale_linear", 3.3), ("scaling.factor", 0.0)])
@torch.no_grad()
def test_linear_scaling(keys: str, factor: float, path: Path, tmp_path: Path) -> None:
    """llama.cpp takes a factor without a type for linear, and 0 for none."""
    parameters = {"rope_type": "linear", "factor": factor} if factor else {"rope_type": "default"}
    theirs = save("Llama", LLAMA | {"rope_parameters": parameters | {"rope_theta": 50.0}}, tmp_path)
    write(path, theirs, **{f"rope.{keys}": factor})
    ours = open_model(path)
    assert ours.settings.rotary_scaling == (RotaryScaling(type="linear", factor=factor) if factor else None)
    torch.testing.assert_close(ours.logits(tokens()), theirs(tokens()).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "factors", [[1.0, 1.3, 1.2], [0.5, 0.5, 0.5], [1.0, 2.0], [1.0, 2.0, math.nan], [1.0, 9.0, 2.0]]
)
def test_other_factors_are_refused(factors: list[float], path: Path, tmp_path: Path) -> None:
    write(path, save("Llama", LLAMA, tmp_path), factors=factors)
    with pytest.raises(LumiereError, match=r"rope_freqs\.weight"):
        open_model(path)


@torch.no_grad()
def test_quantized_weights_are_dequantized(path: Path, tmp_path: Path) -> None:
    theirs = save("Llama", WIDE, tmp_path)
    write(path, theirs, gguf.GGMLQuantizationType.Q8_0)
    rows = theirs.model.layers[1].mlp.up_proj.weight
    steps = rows.reshape(-1, 32).abs().amax(-1, keepdim=True) / 127
    error = (open_model(path).get_parameter("blocks.1.feedforward.up.weight") - rows).reshape(-1, 32).abs()
    assert error.max() > 0
    assert (error <= 0.51 * steps + 1e-3 * rows.abs().max()).all()  # half a step, and the scale is a float16


def test_what_cannot_be_computed_is_named(path: Path, tmp_path: Path) -> None:
    model = save("Llama", LLAMA, tmp_path)
    write(path, model, architecture="gemma")
    with pytest.raises(LumiereError, match="gemma"):
        open_model(path)
    write(path, model, **{"rope.scaling.yarn_ext_factor": 2.0})
    with pytest.raises(LumiereError, match=r"llama\.rope\.scaling\.yarn_ext_factor"):
        open_model(path)
    write(path, model, **{"rope.scaling.attn_factor": 2.0})
    with pytest.raises(LumiereError, match=r"llama\.rope\.scaling\.attn_factor 2\.0"):
        open_model(path)
    for kind in ("yarn", "longrope"):
        write(path, model, **{"rope.scaling.type": kind})
        with pytest.raises(LumiereError, match=rf"llama\.rope\.scaling\.type {kind}"):
            open_model(path)


@pytest.mark.parametrize("kept", [0, 10, 100, 2000, 20_000])
def test_a_file_that_is_cut_short_is_damaged(kept: int, path: Path, tmp_path: Path) -> None:
    write(path, save("Llama", LLAMA, tmp_path))
    data = path.read_bytes()
    assert len(data) > kept
    path.write_bytes(data[:kept])
    with pytest.raises(LumiereError, match="not a whole GGUF file"):
        open_model(path)


def test_a_header_that_counts_more_than_the_file_holds_is_damaged(path: Path, tmp_path: Path) -> None:
    write(path, save("Llama", LLAMA, tmp_path))
    data = bytearray(path.read_bytes())
    data[8:16] = (2**60).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(LumiereError, match="not a whole GGUF file"):
        open_model(path)
