"""GGUF files of the architecture `llama`, checked in llama.cpp.

llama.cpp rotates neighboring pairs of queries and keys, Lumiere pairs (i, i + d_key/2), so that their rows are
reordered. A GGUF file holds no Unicode normalization: its user has to normalize text.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumiere.components.layers import stretch
from lumiere.data.foreign_tokenizer import CONFIG_NAME, ForeignTokenizer
from lumiere.data.tokenizer import PAD, Tokenizer
from lumiere.errors import FailedCheckError, LumiereError, shortened
from lumiere.export.llama_cpp import ask
from lumiere.export.original import Original, render, texts
from lumiere.files import DISK
from lumiere.importing.gguf import NAMES
from lumiere.importing.gguf_tokenizer import CONTROL, NORMAL, PRE_TOKENIZERS, USER_DEFINED
from lumiere.interpret.result import Receipt
from lumiere.models.transformer import Transformer

PACKAGES = ("gguf>=0.19", "xllamacpp>=2026.10")
FILE = "model.gguf"
TOLERANCE = 1e-4
"""Of log-probabilities in float32."""
NUM_PROMPTS = 4
UNUSED = 5
"""Type of a token."""


def check_settings(model: Transformer) -> None:
    """Check that llama.cpp's `llama` computes the model.

    Raises:
        LumiereError: It does not; the setting is named.
    """
    settings = model.settings
    has_windows = any(window is not None and window < model.context_size for window in model.windows)
    held = {
        "norm": (settings.norm == "rms", "rms"),
        "feedforward": (settings.feedforward == "swiglu", "swiglu"),
        "positions": (settings.positions == "rotary", "rotary"),
        "rotary_fraction": (settings.positions != "rotary" or settings.rotary_size == model.d_key, 1),
        "attention_windows": (not has_windows, "none"),
        "attention_scale": (settings.attention_scale in (None, model.d_key**-0.5), "none"),
        "parallel_blocks": (not settings.parallel_blocks, "false"),
        "query_key_norm": (not settings.query_key_norm, "false"),
        "d_value": (model.d_value == model.d_key, model.d_key),
    }
    for name, (is_held, value) in held.items():
        if not is_held:
            raise LumiereError(
                f"the model has {name} {getattr(settings, name)!r}, which a GGUF file of type llama cannot hold",
                f"train with model.{name}={value}, or export with --to hf, which holds every model",
            )


def write(folder: Path, original: Original) -> None:
    """Write a GGUF file in float32 and a README.

    Raises:
        LumiereError: llama.cpp does not compute such a model.
    """
    from gguf import GGUFWriter

    model, tokenizer = original.model, original.tokenizer
    check_settings(model)
    writer = GGUFWriter(folder / FILE, "llama")
    add_settings(writer, model)
    add_tokenizer(writer, tokenizer, model.vocab_size)
    writer.add_name(str(original.origin.get("run", "lumiere")))
    normalizer = normalizer_of(tokenizer)
    if normalizer is not None:
        writer.add_string("lumiere.normalizer", normalizer)
        writer.add_description(normalization_note(normalizer))
    for name, weight in tensors(model).items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    DISK.sync(folder / FILE)
    readme = render(
        "gguf/README.md",
        origin=original.origin,
        normalizer=normalizer,
        context_size=model.context_size,
        has_start=tokenizer.start_id is not None,
    )
    DISK.write(folder / "README.md", readme)


def add_settings(writer: Any, model: Transformer) -> None:
    settings = model.settings
    writer.add_context_length(settings.context_size)
    writer.add_embedding_length(settings.embedding_size)
    writer.add_block_count(settings.num_layers)
    writer.add_feed_forward_length(settings.d_ff)
    writer.add_head_count(settings.num_heads)
    writer.add_head_count_kv(settings.key_value_heads)
    writer.add_key_length(settings.d_key)
    writer.add_value_length(settings.d_value)
    writer.add_layer_norm_rms_eps(settings.norm_epsilon)
    writer.add_rope_freq_base(settings.rotary_base)
    writer.add_rope_dimension_count(settings.rotary_size)
    writer.add_vocab_size(model.vocab_size)
    if (scaling := settings.rotary_scaling) is not None and scaling.type == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", scaling.factor)
    elif scaling is not None:  # llama.cpp computes with the factors in `tensors`; Lumiere's import reads this too
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context_size)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add the tokenizer; rows of the embedding without a token become unused tokens.

    Raises:
        LumiereError: llama.cpp has no such tokenizer.
    """
    contents = json.loads(tokenizer.to_json())
    pre = pre_tokenizer_name(contents)
    added = {token["id"]: token for token in contents["added_tokens"]}
    names = {id_: token for token, id_ in contents["model"]["vocab"].items()}
    names |= {id_: token["content"] for id_, token in added.items()}
    kinds = dict.fromkeys(names, NORMAL)
    kinds |= {id_: CONTROL if token["special"] else USER_DEFINED for id_, token in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(id_, f"<|unused {id_}|>") for id_ in range(vocab_size)])
    writer.add_token_types([kinds.get(id_, UNUSED) for id_ in range(vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in contents["model"]["merges"]])
    writer.add_add_bos_token(tokenizer.start_id is not None)
    for add, ids in (
        (writer.add_bos_token_id, [tokenizer.start_id]),
        (writer.add_eos_token_id, tokenizer.end_ids[:1]),
        (writer.add_eot_token_id, tokenizer.end_ids[1:2]),
        (writer.add_pad_token_id, () if isinstance(tokenizer, ForeignTokenizer) else [PAD]),
    ):
        for id_ in ids:
            if id_ is not None:
                add(id_)
    template = json.loads(tokenizer.files().get(CONFIG_NAME, "{}")).get("chat_template")
    if template is not None:
        writer.add_chat_template(template)


def pre_tokenizer_name(contents: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the pre-tokenizer in a `tokenizer.json`.

    Raises:
        LumiereError: Its pre-tokenizer is unknown, or the tokenizer is not a byte-level BPE.
    """

    def steps(saved: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        listed = [] if saved is None else saved.get("pretokenizers", [saved])
        return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in listed]

    found = steps(contents["pre_tokenizer"])
    for name, make in PRE_TOKENIZERS.items():
        if steps({"pretokenizers": [json.loads(step.__getstate__()) for step in make()]}) == found:
            return name
    raise LumiereError(
        f"the tokenizer is of a kind that Lumiere cannot write to GGUF: {contents['model'].get('type')}",
        f"it writes BPE with the pre-tokenizers {', '.join(PRE_TOKENIZERS)}; or export with --to hf",
    )


def normalizer_of(tokenizer: Tokenizer) -> str | None:
    """Return the Unicode normalization of a tokenizer, such as NFKC.

    Raises:
        LumiereError: It changes text in another way.
    """
    saved = json.loads(tokenizer.to_json())["normalizer"]
    if saved is None:
        return None
    if saved["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise LumiereError(
            f"the tokenizer changes text by {saved['type']}, which GGUF cannot hold", "export with --to hf"
        )
    return saved["type"]


def tensors(model: Transformer) -> dict[str, Tensor]:
    """Return the weights by the names of llama.cpp."""
    settings = model.settings
    names = NAMES | {"attention.query": "blk.{layer}.attn_q", "attention.key": "blk.{layer}.attn_k"}
    heads = {"attention.query": settings.num_heads, "attention.key": settings.key_value_heads}
    found: dict[str, Tensor] = {}
    if settings.rotary_scaling is not None and settings.rotary_scaling.type == "llama3":
        periods = settings.rotary_base ** (torch.arange(0, settings.rotary_size, 2) / settings.rotary_size)
        found["rope_freqs.weight"] = torch.as_tensor(stretch(periods, settings.rotary_scaling))
    for name, weight in model.state_dict().items():
        part, _, kind = name.rpartition(".")
        layer = ""
        if part.startswith("blocks."):
            _, layer, part = part.split(".", 2)
        if part in heads:
            weight = neighboring_pairs(weight, heads[part])
        found[f"{names[part].format(layer=layer)}.{kind}"] = weight.contiguous()
    return found


def neighboring_pairs(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of queries or keys from pairs (i, i + d_key/2) to neighboring pairs."""
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def normalization_note(normalizer: str) -> str:
    return (
        f"GGUF holds no Unicode normalization: bring text into the form {normalizer} first, "
        "or it gets other token ids than in training"
    )


@torch.inference_mode()
def check(folder: Path, original: Original) -> Iterator[Receipt | str]:
    """Compare token ids and the ten best log-probabilities at several positions."""
    model, tokenizer = original.model, original.tokenizer
    ids = original.sample[0].tolist()
    lengths = sorted({max(1, (len(ids) - 1) * part // NUM_PROMPTS) for part in range(1, NUM_PROMPTS + 1)})
    normalized = [tokenizer.normalize(text) for text in texts(original)]
    found = ask(folder / FILE, normalized, [ids[:length] for length in lengths])
    if isinstance(found, str):
        raise FailedCheckError(
            f"llama.cpp cannot run the model: {shortened(found)}; nothing was written",
            "Lumiere is tested with xllamacpp 2026.10.11549",
        )
    num_differing = sum(
        tokenizer.encode(text, start=True) != ids for text, ids in zip(normalized, found.ids, strict=True)
    )
    yield Receipt("texts have the same token ids in llama.cpp", float(num_differing), 0.0)
    logprobs = [model.logits(original.sample[:, :length])[0, -1].double().log_softmax(-1) for length in lengths]
    value_error = order_error = 0.0
    for ours, best in zip(logprobs, found.best, strict=True):
        chosen = ours[[id_ for id_, _ in best]]
        value_error = max(value_error, float((torch.tensor([value for _, value in best]) - chosen).abs().max()))
        order_error = max(order_error, float((ours.topk(len(best)).values - chosen).abs().max()))
    yield Receipt(f"the same ten best log-probabilities there, at {len(lengths)} positions", value_error, TOLERANCE)
    yield Receipt("in the same order", order_error, TOLERANCE)
    if (normalizer := normalizer_of(tokenizer)) is not None:
        yield normalization_note(normalizer)
