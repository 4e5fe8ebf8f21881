"""Models of `transformers` with random weights, opened here, and written again: the same class, config and tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lumiere.export.stock_classes import find_stock, stock_weights
from lumiere.importing.huggingface import open_model
from tests.export.conftest import make_model
from tests.importing.test_huggingface import LLAMA, MODELS, NAMES, ROTATED, save
from tests.models.build import ROTARY


@pytest.mark.parametrize(("kind", "values"), MODELS.values(), ids=MODELS)
def test_what_was_opened_is_written_again(kind: str, values: dict[str, Any], tmp_path: Path) -> None:
    save(kind, values, tmp_path)
    source, model = load_file(tmp_path / "model.safetensors"), open_model(tmp_path)
    stock = find_stock(model)
    assert stock is not None
    expected = {"Mistral": "LlamaForCausalLM"} if not values.get("sliding_window") else {}
    assert stock.class_name == expected.get(kind, NAMES.get(kind, f"{kind}ForCausalLM"))
    written = stock_weights(model, stock)
    for name, tensor in written.items():
        if name in source:
            assert torch.equal(tensor, source.pop(name)), name
        else:  # GPT-NeoX's class has biases; this source had none
            assert name.endswith(".bias"), name
            assert not values.get("attention_bias", True)
            assert not tensor.any(), name
    assert not source


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_of_a_narrow_type_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    save("Llama", LLAMA | ROTATED, tmp_path).to(dtype).save_pretrained(tmp_path)
    source, model = load_file(tmp_path / "model.safetensors"), open_model(tmp_path)
    stock = find_stock(model)
    assert stock is not None
    written = stock_weights(model, stock)
    assert written.keys() == source.keys()
    for name, tensor in source.items():
        assert tensor.dtype == dtype
        assert torch.equal(written[name].to(dtype), tensor), name


WIDE: dict[str, Any] = {"embedding_size": 24}  # a multiple of the number of heads
GPT2 = WIDE | {"norm": "layer", "feedforward": "gelu_tanh", "d_key": 8, "d_value": 8}
LLAMA_LIKE = WIDE | ROTARY


@pytest.mark.parametrize(
    ("changes", "class_name"),
    [
        (LLAMA_LIKE, "LlamaForCausalLM"),
        (LLAMA_LIKE | {"tie_embeddings": False, "num_key_value_heads": 1, "bias": "all"}, "LlamaForCausalLM"),
        (LLAMA_LIKE | {"attention_windows": [3, 3]}, "MistralForCausalLM"),
        (LLAMA_LIKE | {"attention_windows": [12, 99]}, "LlamaForCausalLM"),  # no shorter than the context
        (LLAMA_LIKE | {"bias": "qkv"}, "Qwen2ForCausalLM"),
        (LLAMA_LIKE | {"attention_windows": [None, 3]}, "Qwen2ForCausalLM"),  # with biases that are zero
        (LLAMA_LIKE | {"query_key_norm": True, "attention_scale": 6**-0.5}, "Qwen3ForCausalLM"),
        (GPT2, "GPT2LMHeadModel"),
        (GPT2 | {"bias": "all"}, "GPT2LMHeadModel"),
        (GPT2 | {"attention_scale": 1.0}, "GPTNeoForCausalLM"),
        (GPT2 | ROTARY | {"parallel_blocks": True, "rotary_fraction": 0.25}, "GPTNeoXForCausalLM"),
        (WIDE, None),
        (LLAMA_LIKE | {"d_value": 5}, None),
        (ROTARY, None),
        (LLAMA_LIKE | {"norm": "layer"}, None),
        (LLAMA_LIKE | {"rotary_fraction": 1 / 3}, None),
        (LLAMA_LIKE | {"attention_scale": 0.5}, None),
        (GPT2 | {"attention_scale": 1.0, "bias": "qkv"}, None),  # GPT-Neo has no place for these biases
        (GPT2 | {"positions": "none"}, None),
        (GPT2 | {"feedforward": "none"}, None),
    ],
)
def test_which_class_computes_a_model(changes: dict[str, Any], class_name: str | None) -> None:
    found = find_stock(make_model(**changes))
    assert (found and found.class_name) == class_name
