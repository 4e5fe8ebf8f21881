"""State dicts of nanoGPT and TransformerLens, saved as safetensors with their settings in a `config.json`.

nanoGPT's settings are those of its `GPTConfig`, TransformerLens's those of its `HookedTransformerConfig`. A key that
changes what a model computes is read, or must have the value without effect; an unknown key is refused.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lumiere.config.schema import ModelConfig
from lumiere.errors import LumiereError
from lumiere.importing.architectures import ACTIVATIONS, CLASSES, QKV, Architecture, Keys, Source, valid_sizes

NANO_GPT, TRANSFORMER_LENS = "nanogpt", "transformer-lens"
BOOLEANS = {True: True, False: False}
HINTS = {
    NANO_GPT: "write the checkpoint's model_args (n_layer, n_head, n_embd, block_size, ...) to it as JSON",
    TRANSFORMER_LENS: "write model.cfg.to_dict() to it as JSON",
}


def kind_of(values: Mapping[str, Any]) -> str | None:
    """Return whose settings a `config.json` holds; None if they are not those of a state dict."""
    if "model_type" in values:
        return None
    return NANO_GPT if "block_size" in values else TRANSFORMER_LENS if "d_model" in values else None


def hint_for(names: Iterable[str]) -> str | None:
    """Return how to write the `config.json` that is missing beside tensors of these names; None if they are others'."""
    for name in names:
        if name.endswith(("attn.c_attn.weight", "lm_head.weight")):
            return HINTS[NANO_GPT]
        if name.endswith((".W_Q", "unembed.W_U")):
            return HINTS[TRANSFORMER_LENS]
    return None


def read_architecture(kind: str, values: Mapping[str, Any], tensors: dict[str, Tensor]) -> Architecture:
    """Return the model that settings and tensors describe.

    Args:
        kind: As `kind_of` returns it.
        tensors: The whole state dict. Biases that are zero and have no place in our model are removed from it.

    Raises:
        LumiereError: A key is missing, unknown or has a value that Lumiere cannot compute; or a tensor has an effect
            that Lumiere's model lacks.
    """
    read, neutral, without_effect = READERS[kind]
    norm = values.get("normalization_type", "LN") or "none"  # null is a value: no norm
    keys = Keys({**values, "model_type": kind, "normalization_type": norm})
    with valid_sizes("config.json"):
        found = read(keys, tensors)
    keys.finish(neutral, without_effect)
    return found


def _third(name: str, number: int) -> Source:
    """The queries, keys or values of nanoGPT's joined projection, (3 E, E) or (3 E,)."""
    return Source(name, lambda tensor, settings: tensor.chunk(3)[number], lambda parts, settings: torch.cat([*parts]))


def _nano_gpt(keys: Keys, tensors: dict[str, Tensor]) -> Architecture:
    """nanoGPT (Karpathy 2022): GPT-2 with the matrices of `nn.Linear`, without biases if `bias` is false.

    Its settings have no name for the activation function, which was GELU's tanh form in older versions: exact GELU,
    unless `activation_function` says `gelu_new`.
    """
    width, num_heads = keys.count("n_embd"), keys.count("n_head")
    is_tied = len({"wte.weight", "lm_head.weight"} & tensors.keys()) < 2 or torch.equal(
        tensors["wte.weight"], tensors["lm_head.weight"]
    )
    settings = ModelConfig.model_validate(
        {
            "embedding_size": width,
            "context_size": keys.count("block_size"),
            "num_layers": keys.count("n_layer"),
            "num_heads": num_heads,
            "d_key": width // num_heads,
            "d_value": width // num_heads,
            "d_ff": 4 * width,
            "feedforward": keys.expect("activation_function", ACTIVATIONS, "gelu"),
            "norm": "layer",
            "norm_epsilon": 1e-5,
            "bias": keys.expect("bias", {True: "all", False: "none"}, True),
            "tie_embeddings": is_tied,
        }
    )
    sources = {
        # Of two names for one tensor, `safetensors.torch.save_model` keeps the first by the alphabet.
        "token_embedding": Source("wte" if "wte.weight" in tensors else "lm_head"),
        "position_embedding": Source("wpe"),
        "attention_norm": Source("h.{layer}.ln_1"),
        **{f"attention.{part}": _third("h.{layer}.attn.c_attn", i) for i, part in enumerate(QKV)},
        "attention.output": Source("h.{layer}.attn.c_proj"),
        "feedforward_norm": Source("h.{layer}.ln_2"),
        "feedforward.up": Source("h.{layer}.mlp.c_fc"),
        "feedforward.down": Source("h.{layer}.mlp.c_proj"),
        "final_norm": Source("ln_f"),
        "output_head": Source("lm_head"),
    }
    return Architecture(keys.count("vocab_size"), settings, sources, unused=(".attn.bias",))


NORMS = {"LN": "layer", "LNPre": "layer_plain", "RMS": "rms", "RMSPre": "rms", "none": "none"}
"""By TransformerLens's `normalization_type`; where it ends in `Pre`, gains are folded into other weights."""
PLAIN = {**ACTIVATIONS, "gelu_fast": "gelu_tanh"}
GATED = {"silu": "swiglu", "gelu": "geglu"}
"""By TransformerLens's `act_fn`."""
KNOWN = (*CLASSES.values(), "OPTForCausalLM", "mingpt", "neel", "neel-solu-old")
"""Values of its `original_architecture` for which no part of the model is computed in another way."""
BUFFERS = (".attn.mask", ".attn.IGNORE", ".attn.rotary_sin", ".attn.rotary_cos")
"""Ends of the names of its buffers, which follow from the settings."""


def _transformer_lens(keys: Keys, tensors: dict[str, Tensor]) -> Architecture:
    """`HookedTransformer` of TransformerLens (Nanda & Bloom 2022), versions 1 to 3; with its weights folded or not."""
    width, d_head, num_layers = keys.count("d_model"), keys.count("d_head"), keys.count("n_layers")
    num_heads, vocab_size, context_size = keys.count("n_heads", -1), keys.count("d_vocab"), keys.count("n_ctx")
    num_heads = width // d_head if num_heads == -1 else num_heads
    if (num_out := keys.count("d_vocab_out", -1)) not in (-1, vocab_size):
        raise keys.wrong("d_vocab_out", num_out, f"d_vocab ({vocab_size})")
    is_gated = keys.expect("gated_mlp", BOOLEANS, False)
    activations = GATED if is_gated else PLAIN
    feedforward = keys.take("act_fn", "relu")
    if keys.expect("attn_only", BOOLEANS, False):
        feedforward = "none"
    elif feedforward not in activations:
        raise keys.wrong("act_fn", feedforward, " or ".join(activations))
    kind = keys.expect("normalization_type", {name: name for name in NORMS}, "LN")
    norm = NORMS[kind]
    if keys.expect("final_rms", BOOLEANS, False) and norm != "rms":
        raise keys.wrong("final_rms", True, f"false with normalization_type {kind}")
    num_key_value_heads = keys.take("n_key_value_heads", 0)
    keys.expect("original_architecture", {name: name for name in (None, *KNOWN)}, None)
    _drop_zeros(
        tensors, ("unembed.b_U",), "folding the final norm makes it: save from_pretrained_no_processing's model"
    )
    if is_gated:
        _drop_zeros(tensors, (".mlp.b_in",), "its feed-forward part adds it after the product, Lumiere's before")
    settings = ModelConfig.model_validate(
        {
            "embedding_size": width,
            "context_size": context_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_key_value_heads": num_key_value_heads or num_heads,
            "d_key": d_head,
            "d_value": d_head,
            "d_ff": keys.count("d_mlp", 4 * width),
            "feedforward": activations.get(feedforward, "none"),
            "norm": norm,
            "norm_epsilon": keys.take("eps", 1e-5),
            "bias": _biases(tensors),
            "tie_embeddings": False,
            "parallel_blocks": keys.expect("parallel_attn_mlp", BOOLEANS, False),
            "query_key_norm": keys.expect("use_qk_norm", BOOLEANS, False),
            "attention_scale": _attention_scale(keys, d_head),
            **_positions(keys, d_head),
            **_windows(keys, num_layers),
        }
    )
    if settings.attention_windows is not None and settings.rotary_scaling is not None:
        raise keys.wrong("use_local_attn", True, "all or none of the layers with scaled rotations, so false")
    if kind == "RMSPre" and (embedding := tensors.get("embed.W_E")) is not None:
        parts = ("ln1",) if feedforward == "none" else ("ln1", "ln2")
        places = ["ln_final", *(f"blocks.{layer}.{part}" for layer in range(settings.num_layers) for part in parts)]
        tensors |= dict.fromkeys((f"{place}.w" for place in places), embedding.new_ones(embedding.shape[-1:]))
    return Architecture(vocab_size, settings, _lens_sources(bool(num_key_value_heads)), unused=BUFFERS)


def _attention_scale(keys: Keys, d_head: int) -> float | None:
    """Return our factor of scores, which TransformerLens divides by `attn_scale`."""
    divisor = keys.take("attn_scale", -1.0)
    if not keys.expect("use_attn_scale", BOOLEANS, True):
        return 1.0
    return None if divisor == -1 or math.isclose(divisor, math.sqrt(d_head), rel_tol=1e-9) else 1 / divisor


def _positions(keys: Keys, d_head: int) -> dict[str, Any]:
    kind = keys.expect("positional_embedding_type", {"standard": "learned", "rotary": "rotary"}, "standard")
    size, base = keys.count("rotary_dim", d_head), keys.take("rotary_base", 10_000)
    by_parts, factor = keys.expect("use_NTK_by_parts_rope", BOOLEANS, False), keys.take("rotary_scaling_factor", 1.0)
    bands = {
        "factor": keys.take("NTK_by_parts_factor", 8.0),
        "original_context_size": keys.take("NTK_original_ctx_len", 8192),
        "low_frequency_factor": keys.take("NTK_by_parts_low_freq_factor", 1.0),
        "high_frequency_factor": keys.take("NTK_by_parts_high_freq_factor", 4.0),
    }
    scaling = {"type": "llama3", **bands} if by_parts else {"type": "linear", "factor": factor} if factor != 1 else None
    if kind != "rotary":
        return {"positions": kind}
    return {"positions": kind, "rotary_base": base, "rotary_fraction": size / d_head, "rotary_scaling": scaling}


def _windows(keys: Keys, num_layers: int) -> dict[str, Any]:
    window, kinds = keys.take("window_size", 0), keys.take("attn_types", [])
    if not keys.expect("use_local_attn", BOOLEANS, False):
        return {}
    choices = {"global": None, "local": window}
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in choices for kind in kinds):
        raise keys.wrong("attn_types", kinds, f"{num_layers} of global or local")
    return {"attention_windows": [choices[kind] for kind in kinds]}


def _biases(tensors: dict[str, Tensor]) -> str:
    """Return our setting for the biases that are not zero; TransformerLens always has all, and zeros are removed."""
    parts = {"qkv": (".b_Q", ".b_K", ".b_V", "._b_K", "._b_V"), "all": (".b_O", ".mlp.b_in", ".mlp.b_out")}
    names = {kind: [name for name in tensors if name.endswith(ends)] for kind, ends in parts.items()}
    if any(tensors[name].any() for name in names["all"]):
        return "all"
    for name in names["all"]:
        del tensors[name]
    if any(tensors[name].any() for name in names["qkv"]):
        return "qkv"
    for name in names["qkv"]:
        del tensors[name]
    return "none"


def _drop_zeros(tensors: dict[str, Tensor], ends: Collection[str], hint: str) -> None:
    """Remove tensors that Lumiere's model has no place for.

    Raises:
        LumiereError: One is not zero.
    """
    for name in [name for name in tensors if name.endswith(tuple(ends))]:
        if tensors.pop(name).any():
            raise LumiereError(f"the tensor {name} is not zero, and Lumiere's model has no such bias", hint)


def _lens_sources(is_grouped: bool) -> dict[str, Source]:
    """Return where our tensors are in a `HookedTransformer`, whose matrices multiply from the right."""
    linear, gains = {"weight": "W", "bias": "b"}, {"weight": "w", "bias": "b"}
    group = "_" if is_grouped else ""

    def norm(name: str) -> Source:
        return Source(name + ".{kind}", kinds=gains)

    def matrix(name: str) -> Source:
        return Source(name, lambda tensor, settings: tensor.t() if tensor.ndim == 2 else tensor, kinds=linear)

    def per_head(name: str) -> Source:
        """(H, E, K) and (H, K), which become (H K, E) and (H K,)."""
        return Source(name, lambda tensor, settings: tensor.transpose(1, -1).flatten(0, 1), kinds=linear)

    def output(tensor: Tensor, settings: ModelConfig) -> Tensor:
        """(H, K, E) becomes (E, H K)."""
        return tensor.flatten(0, 1).t() if tensor.ndim == 3 else tensor

    return {
        "token_embedding": Source("embed.{kind}_E", kinds=linear),
        "position_embedding": Source("pos_embed.{kind}_pos", kinds=linear),
        "attention_norm": norm("blocks.{layer}.ln1"),
        "attention.query": per_head("blocks.{layer}.attn.{kind}_Q"),
        "attention.key": per_head(f"blocks.{{layer}}.attn.{group}{{kind}}_K"),
        "attention.value": per_head(f"blocks.{{layer}}.attn.{group}{{kind}}_V"),
        "attention.query_norm": norm("blocks.{layer}.attn.q_norm"),
        "attention.key_norm": norm("blocks.{layer}.attn.k_norm"),
        "attention.output": Source("blocks.{layer}.attn.{kind}_O", output, kinds=linear),
        "feedforward_norm": norm("blocks.{layer}.ln2"),
        "feedforward.gate": matrix("blocks.{layer}.mlp.{kind}_gate"),
        "feedforward.up": matrix("blocks.{layer}.mlp.{kind}_in"),
        "feedforward.down": matrix("blocks.{layer}.mlp.{kind}_out"),
        "final_norm": norm("ln_final"),
        "output_head": matrix("unembed.{kind}_U"),
    }


LENS_NEUTRAL: dict[str, Any] = {
    "attention_dir": "causal",
    "attn_scores_soft_cap": -1.0,
    "clip_qkv": None,
    "load_in_4bit": False,
    "num_experts": None,
    "output_logits_soft_cap": -1.0,
    "post_embedding_ln": False,
    "quantization_method": None,
    "rotary_adjacent_pairs": False,
    "rotary_base_local": None,
    "scale_attn_by_inverse_layer_idx": False,
    "use_attention_sinks": False,
    "use_dynamic_ntk_rope": False,
    "use_logn_attn": False,
    "use_normalization_before_and_after": False,
    "use_yarn_rope": False,
}
"""Settings of TransformerLens that Lumiere's model lacks, with the value that changes nothing."""
LENS_WITHOUT_EFFECT = frozenset(
    {
        *("checkpoint_index", "checkpoint_label_type", "checkpoint_value", "from_checkpoint", "model_name", "n_params"),
        *("decoder_start_token_id", "default_prepend_bos", "tokenizer_name", "tokenizer_prepends_bos"),
        *("device", "dtype", "n_devices", "trust_remote_code"),
        *("init_mode", "init_weights", "initializer_range", "seed", "tie_word_embeddings"),
        *("experts_per_token", "norm_topk_prob", "layer_norm_folding", "model_type", "uses_rms_norm"),
        *("relative_attention_max_distance", "relative_attention_num_buckets", "train_seq_length"),
        *("ungroup_grouped_query_attention", "use_attn_in", "use_attn_result", "use_hook_mlp_in", "use_hook_tokens"),
        *("use_split_qkv_input", "yarn_attention_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_factor"),
        *("yarn_global_attn_only", "yarn_original_max_position_embeddings", "yarn_truncate"),
    }
)
"""Settings of TransformerLens that do not change what a trained model computes."""

Read = Callable[[Keys, dict[str, Tensor]], Architecture]
READERS: dict[str, tuple[Read, Mapping[str, Any], Collection[str]]] = {
    NANO_GPT: (_nano_gpt, {}, frozenset({"dropout", "model_type", "normalization_type"})),
    TRANSFORMER_LENS: (_transformer_lens, LENS_NEUTRAL, LENS_WITHOUT_EFFECT),
}
"""How each is read, and its keys that are not read."""
