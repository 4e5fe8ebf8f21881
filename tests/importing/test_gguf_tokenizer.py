"""Tokenizers of GGUF files, against llama.cpp reading the same files."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from lumiere.errors import LumiereError
from lumiere.importing.gguf_tokenizer import CONTROL, NORMAL, PRE_TOKENIZERS, USER_DEFINED, read_tokenizer
from tests.data.foreign import TEXTS
from tests.importing.test_smollm import PATH as SMOLLM

needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="pip install xllamacpp")
SAMPLES = [
    "Once upon a time, Mia said: hello! It's 12345 or 3.14159, isn't it?",
    "  two   spaces,\ttabs\n\n\nand line ends  \r\n",
    "def f(x):\n    return x**2 + 1  # a comment\n\n\nclass A:\n\tpass",
    "Ünïcödé naïve café 日本語 العربية 🎉 👩\u200d👩\u200d👧 ½ x²",
    "I'M you'Ll we'VE ... --- ((())) <|special|> <more> $$$\n$$",
    "1 12 123 1234 12345678901234567890",
]


def fields_of(pre: str) -> dict[str, Any]:
    """A trained tokenizer as the keys of a GGUF file."""
    backend: Any = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*TEXTS, *SAMPLES * 3], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "<|special|>", "<more>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * (len(tokens) - 2) + [CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def write(path: Path, fields: dict[str, Any]) -> None:
    """A GGUF file with a tokenizer and the smallest Llama."""
    writer = gguf.GGUFWriter(path, "llama")
    size, vocab = 32, len(fields["tokenizer.ggml.tokens"])
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(size)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"])
    writer.add_token_list(fields["tokenizer.ggml.tokens"])
    writer.add_token_types(fields["tokenizer.ggml.token_type"])
    writer.add_token_merges(fields["tokenizer.ggml.merges"])
    writer.add_bos_token_id(fields["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(fields["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(fields["tokenizer.ggml.add_bos_token"])
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{name}": (size, size) for name in square}
    shapes |= {"token_embd": (vocab, size)} | dict.fromkeys(
        ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (size,)
    )
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ids_of_llama_cpp(path: Path, texts: list[str]) -> list[list[int]]:
    from lumiere.export.llama_cpp import Answer, ask

    answer = ask(path, texts, [[1, 2]])
    assert isinstance(answer, Answer), answer
    return answer.ids


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_are_those_of_llama_cpp(pre: str, tmp_path: Path) -> None:
    fields = fields_of(pre)
    write(tmp_path / "model.gguf", fields)
    tokenizer = read_tokenizer(fields, "model.gguf")
    assert [tokenizer.encode(text) for text in SAMPLES] == ids_of_llama_cpp(tmp_path / "model.gguf", SAMPLES)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.skipif(not SMOLLM.exists(), reason="SmolLM2 is not downloaded: make smollm")
def test_ids_of_smollm2_are_those_of_llama_cpp() -> None:
    reader = gguf.GGUFReader(SMOLLM)
    tokenizer = read_tokenizer({name: field.contents() for name, field in reader.fields.items()}, str(SMOLLM))
    assert [tokenizer.encode(text) for text in SAMPLES] == ids_of_llama_cpp(SMOLLM, SAMPLES)


def test_special_tokens_are_no_text() -> None:
    fields = fields_of("smollm")
    tokenizer = read_tokenizer(fields, "model.gguf")
    size = len(fields["tokenizer.ggml.tokens"])
    assert (tokenizer.start_id, tokenizer.end_ids) == (None, (size - 2,))
    assert size - 2 not in tokenizer.encode("<|special|>")
    assert size - 1 in tokenizer.encode("<more>")
    assert tokenizer.decode(tokenizer.encode(SAMPLES[2])) == SAMPLES[2]


def test_llama_3_starts_a_text() -> None:
    fields = fields_of("llama-bpe")
    del fields["tokenizer.ggml.add_bos_token"]
    assert read_tokenizer(fields, "model.gguf").start_id == fields["tokenizer.ggml.bos_token_id"]


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.model": "llama"},
        {"tokenizer.ggml.pre": "deepseek"},
        {"tokenizer.ggml.tokens": ["a", "a"]},
        {"tokenizer.ggml.tokens": 3},
        {"tokenizer.ggml.merges": ["un known"]},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.bos_token_id": 10**6},
    ],
)
def test_other_and_damaged_tokenizers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LumiereError):
        read_tokenizer(fields_of("gpt-2") | change, "model.gguf")
