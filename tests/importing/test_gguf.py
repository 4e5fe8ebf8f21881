"""A GGUF file with the weights of a Llama of `transformers`, opened and compared with it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

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
    for name, value in changes.items():
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
    write(path, model, **{"rope.scaling.factor": 2.0})
    with pytest.raises(LumiereError, match=r"llama\.rope\.scaling\.factor"):
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
