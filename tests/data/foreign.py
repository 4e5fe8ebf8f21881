"""Tokenizers as other makers train them."""

import json
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lumiere.data.stories import story

TEXTS = [story("train", number) for number in range(40)] + ["Ünïcödé 日本語 123,456 x = f(y)\n\n"] * 3


def byte_level(*pre: Any, **options: Any) -> tokenizers.Tokenizer:
    """As GPT-2's, with one special token."""
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizers.Sequence([*pre, pre_tokenizers.ByteLevel(add_prefix_space=False, **options)]),
        decoders.ByteLevel(),
    )


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2's: spaces become U+2581, unknown characters become bytes, `<s>` starts a text."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = trained(
        models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *pieces], show_progress=False),
        None,
        decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore
    return with_special(backend, 3)


def unigram() -> tokenizers.Tokenizer:
    """A Unigram model whose vocabulary spells its special tokens."""
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
        ),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )


def never_ending() -> tokenizers.Tokenizer:
    """A pattern that backtracks forever on runs of `a`."""
    return byte_level(pre_tokenizers.Split(Regex("(a+)+$"), "isolated"))


def trained(model: Any, trainer: Any, pre: Any, decoder: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    backend: Any = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    backend.decoder = decoder
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def with_special(backend: tokenizers.Tokenizer, count: int) -> tokenizers.Tokenizer:
    """Make ordinary tokens of all added ones but the first `count`."""
    contents = json.loads(backend.to_str())
    contents["added_tokens"] = contents["added_tokens"][:count]
    return tokenizers.Tokenizer.from_str(json.dumps(contents))
