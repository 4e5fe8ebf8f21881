"""Rebuild the tokenizer of a GGUF file, from its tokens, merges, token types and the name of its pre-tokenizer.

The pre-tokenizers are those of llama.cpp (`llm_tokenizer_bpe` in llama-vocab.cpp) by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lumiere.data.foreign_tokenizer import ForeignTokenizer
from lumiere.errors import LumiereError, printable, shortened

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Types of tokens."""
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


PRE_TOKENIZERS: Mapping[str, Callable[[], list[Any]]] = {
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": lambda: _split(LLAMA_3),
    "qwen2": lambda: _split(QWEN_2),
}
WHOLE_WORDS, STARTS = {"llama-bpe"}, {"llama-bpe"}
"""Pre-tokenizers whose words are looked up whole before they are merged; that start a text unless the file says so."""


def read_tokenizer(fields: Mapping[str, Any], name: str) -> ForeignTokenizer:
    """Return the tokenizer that the keys of a GGUF file describe.

    Args:
        name: The file, for errors.

    Raises:
        LumiereError: Its kind or its pre-tokenizer is none of those that Lumiere knows, or it is damaged.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        shown = shortened(printable(f"{kind}, pre-tokenizer {pre}"))
        known = f"Lumiere reads gpt2 with the pre-tokenizers {', '.join(PRE_TOKENIZERS)}"
        raise LumiereError(f"{name!r} has a tokenizer of the kind {shown}", known)
    try:
        text = _rebuilt(fields, str(pre)).to_str()
        config = _config(fields, str(pre))
    except Exception as error:  # the library raises bare Exception; the lists may have any types
        reason = shortened(printable(f"{type(error).__name__}: {error}"))
        raise LumiereError(f"the tokenizer in {name!r} is damaged ({reason})", "fetch the file again") from None
    return ForeignTokenizer.parse(text, config, name)


def _rebuilt(fields: Mapping[str, Any], pre: str) -> tokenizers.Tokenizer:
    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or (types is not None and len(types) != len(tokens)):
        raise ValueError("its lists of tokens and types contradict each other")
    model: Any = models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS)
    backend = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = dict(zip(tokens, types or [NORMAL] * len(tokens), strict=True))
    backend.add_special_tokens([token for token, kind in kinds.items() if kind == CONTROL])
    added = [AddedToken(token, normalized=False) for token, kind in kinds.items() if kind == USER_DEFINED]
    backend.add_tokens(added)
    return backend


def _config(fields: Mapping[str, Any], pre: str) -> dict[str, Any]:
    """Return what `tokenizer_config.json` would say."""
    tokens = fields["tokenizer.ggml.tokens"]

    def token(key: str) -> str | None:
        number = fields.get(f"tokenizer.ggml.{key}")
        return None if number is None else tokens[number]

    ends = [token("eos_token_id"), token("eot_token_id")]
    return {
        "bos_token": token("bos_token_id"),
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", pre in STARTS)),
        "end_tokens": list(dict.fromkeys(end for end in ends if end is not None)),
        "chat_template": fields.get("tokenizer.chat_template"),
    }
