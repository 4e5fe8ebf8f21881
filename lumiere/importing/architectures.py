"""Model settings and names of weights for the `config.json` of Hugging Face models.

A key that changes what a model computes is read, or must have the value without effect; an unknown key is refused. The
reference for meaning and defaults is the code of `transformers` 5.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lumiere.config.schema import ModelConfig
from lumiere.errors import LumiereError, printable, shortened

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""Plain feed-forward parts by their activation functions."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo": "OlmoForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_neo": "GPTNeoForCausalLM",
}
"""The class in `transformers` of each type."""

WITHOUT_EFFECT = frozenset(
    {
        *("_attn_implementation", "_name_or_path", "architectures", "attn_implementation", "auto_map", "model_type"),
        *("dtype", "torch_dtype", "transformers_version", "tokenizer_class", "transformers.js_config"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
        *("chunk_size_feed_forward", "gradient_checkpointing", "output_attentions", "output_hidden_states"),
        *("is_decoder", "is_encoder_decoder", "return_dict", "use_bfloat16", "use_cache"),
        *("attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop", "embed_dropout", "hidden_dropout"),
        *("initializer_range", "resid_dropout", "resid_pdrop"),
        *("id2label", "label2id", "problem_type", "task_specific_params"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        *("max_window_layers", "n_ctx", "pretraining_tp", "reorder_and_upcast_attn", "rope_interleaved"),
    }
)
"""Keys that do not change what a trained model computes."""

NEUTRAL: dict[str, Any] = {
    "quantization_config": None,
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "clip_qkv": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "torchscript": False,
}
"""Keys that Lumiere's model lacks, with the value that changes nothing."""

Arrange = Callable[[Tensor, ModelConfig], Tensor]
"""Turns a source's tensor into one of ours."""
Restore = Callable[[Sequence[Tensor], ModelConfig], Tensor]
"""The inverse: turns our tensors that come from one of a source, in the order of our names, into that one."""


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from."""

    name: str
    """In the source, with `{layer}`; the same for our tensors that are joined there."""
    arrange: Arrange = lambda tensor, settings: tensor
    restore: Restore = lambda parts, settings: parts[0]
    kinds: Mapping[str, str] = field(default_factory=dict)
    """What weight and bias are called in the place of `{kind}` in the name; by default they follow it, after a dot."""

    def tensor(self, layer: str, kind: str) -> str:
        """Return the name of the weight or the bias in the source."""
        if self.kinds:
            return self.name.format(layer=layer, kind=self.kinds[kind])
        return f"{self.name.format(layer=layer)}.{kind}"


@dataclass(frozen=True)
class Architecture:
    """A model of a source: our settings, and where our tensors are.

    Attributes:
        sources: By the name of our module, such as `attention.query`; each has a weight and perhaps a bias.
        unused: Ends of the names of tensors that a source stores and computes without.

    Raises:
        ValueError: There is no vocabulary.
    """

    vocab_size: int
    settings: ModelConfig
    sources: Mapping[str, Source]
    unused: tuple[str, ...] = field(
        default=("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")
    )

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}")


class Keys:
    """The keys of a `config.json`, each to be taken once.

    Raises:
        LumiereError: A key is missing or has another type.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = dict(values)
        self.model_type = str(values.get("model_type"))

    def take(self, name: str, default: Any = ...) -> Any:
        """Return a value; `default` if the key is missing or null."""
        value = self._left.pop(name, None)
        if value is None and default is ...:
            raise LumiereError(f"config.json lacks {name}", f"a model of type {self.model_type} needs it")
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Return whether a key is given and not yet taken."""
        return self._left.get(name) is not None

    def count(self, name: str, default: Any = ...) -> int:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, value, "a whole number")
        return value

    def expect(self, name: str, choices: Mapping[Any, Any], default: Any) -> Any:
        """Return what `choices` has for the value of a key."""
        value = self.take(name, default)
        if not isinstance(value, str | int | float | None) or value not in choices:
            raise self.wrong(name, value, " or ".join(map(str, choices)))
        return choices[value]

    def wrong(self, name: str, value: Any, expected: str) -> LumiereError:
        shown = shortened(printable(str(value)))
        return LumiereError(f"config.json has {name} {shown}", f"Lumiere computes {expected} there")

    def finish(self, neutral: Mapping[str, Any] = NEUTRAL, without_effect: Collection[str] = WITHOUT_EFFECT) -> None:
        """Check that what is left changes nothing.

        Args:
            neutral: Keys that must have the given value.
            without_effect: Keys that may have any value.

        Raises:
            LumiereError: A key is unknown, or has an effect that Lumiere lacks.
        """
        for name, value in self._left.items():
            if name in neutral:
                if value != neutral[name] and value is not None:
                    raise self.wrong(name, value, f"only {neutral[name]}")
            elif name not in without_effect:
                raise LumiereError(
                    f"config.json has the unknown key {shortened(printable(name))}",
                    "Lumiere reads every key that changes what a model computes, and does not know this one",
                )


def read_architecture(values: Mapping[str, Any]) -> Architecture:
    """Return the model that a `config.json` describes.

    Raises:
        LumiereError: Its type is unknown, or a key is missing, unknown or has a value that Lumiere cannot compute.
    """
    keys = Keys(values)
    if keys.model_type not in READERS:
        raise LumiereError(
            f"config.json has model_type {shortened(printable(keys.model_type))}",
            f"Lumiere reads {', '.join(READERS)}; and state dicts of nanoGPT (with block_size) and TransformerLens",
        )
    with valid_sizes("config.json"):
        found = READERS[keys.model_type](keys)
    keys.finish()
    return found


@contextmanager
def valid_sizes(name: str) -> Iterator[None]:
    """Turn errors of values that describe no model, such as 0 heads or a list in place of a number, into ours.

    Args:
        name: The file that holds the values.
    """
    try:
        yield
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        setting = problem.get("ctx", {}).get("path", f"model.{'.'.join(map(str, problem['loc']))}")
        raise LumiereError(
            f"{name} describes a model that cannot be: {setting} {problem['msg']}", "fetch it again"
        ) from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        reason = shortened(printable(str(error)))
        raise LumiereError(f"{name} describes a model that cannot be: {reason}", "fetch it again") from None


def _rotation(keys: Keys) -> dict[str, Any]:
    """Read the rotary positions, from `rope_parameters` (transformers 5) or the keys of older versions."""
    parameters = keys.take("rope_parameters", {})
    given = [values for values in (keys.take("rope_scaling", {}), parameters) if values != {}]
    for values in given:
        if not isinstance(values, dict):
            raise keys.wrong("rope_parameters", values, "a mapping")
    scalings = [_scaling(keys, values) for values in given] or [None]
    if scalings[0] != scalings[-1]:
        raise keys.wrong("rope_scaling", given[0], "what rope_parameters say")
    base = parameters.get("rope_theta", keys.take("rope_theta", keys.take("rotary_emb_base", 10_000.0)))
    older = keys.take("partial_rotary_factor", keys.take("rotary_pct", 1.0))
    return {
        "positions": "rotary",
        "rotary_base": base,
        "rotary_fraction": parameters.get("partial_rotary_factor", older),
        "rotary_scaling": scalings[0],
    }


SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context_size",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
}
"""The supported scalings of rotary positions, and what their keys are called here."""


def rope_parameters(settings: ModelConfig) -> dict[str, Any]:
    """Return `rope_parameters` of transformers 5 for rotary positions."""
    scaling = settings.rotary_scaling
    names = {} if scaling is None else SCALINGS[scaling.type]
    return {
        "rope_type": "default" if scaling is None else scaling.type,
        **{theirs: getattr(scaling, ours) for theirs, ours in names.items()},
        "rope_theta": settings.rotary_base,
    }


def _scaling(keys: Keys, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the scaling of rotary positions from `rope_scaling` or `rope_parameters`."""
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in SCALINGS:
        raise keys.wrong("rope_parameters of type", kind, " or ".join(SCALINGS))
    names = SCALINGS[kind]
    if unknown := values.keys() - names.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
        raise keys.wrong(f"rope_parameters of type {kind} with", min(unknown, key=str), ", ".join(names) or "none")
    if missing := names.keys() - values.keys():
        raise keys.wrong(f"rope_parameters of type {kind} without", min(missing), ", ".join(names))
    return {"type": kind} | {ours: values[theirs] for theirs, ours in names.items()} if names else None


def _windows(keys: Keys, num_layers: int, context_size: int) -> dict[str, Any]:
    """Read sliding windows: for all layers (Mistral), from a layer on, or as listed (Qwen)."""
    window = keys.take("sliding_window", 0)
    layer_types = keys.take("layer_types", None)
    if not keys.take("use_sliding_window", True) or not window or window >= context_size:
        return {}
    if layer_types is None:
        first = keys.count("max_window_layers", 0)
        layer_types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    kinds = {"sliding_attention": window, "full_attention": None}
    if not isinstance(layer_types, list) or any(kind not in kinds for kind in layer_types):
        raise keys.wrong("layer_types", layer_types, " or ".join(kinds))
    return {"attention_windows": [kinds[kind] for kind in layer_types]}


LLAMA_NAMES = {
    "token_embedding": "embed_tokens",
    "attention_norm": "layers.{layer}.input_layernorm",
    "attention.query": "layers.{layer}.self_attn.q_proj",
    "attention.key": "layers.{layer}.self_attn.k_proj",
    "attention.value": "layers.{layer}.self_attn.v_proj",
    "attention.output": "layers.{layer}.self_attn.o_proj",
    "attention.query_norm": "layers.{layer}.self_attn.q_norm",
    "attention.key_norm": "layers.{layer}.self_attn.k_norm",
    "feedforward_norm": "layers.{layer}.post_attention_layernorm",
    "feedforward.gate": "layers.{layer}.mlp.gate_proj",
    "feedforward.up": "layers.{layer}.mlp.up_proj",
    "feedforward.down": "layers.{layer}.mlp.down_proj",
    "final_norm": "norm",
    "output_head": "lm_head",
}


def _llama(keys: Keys) -> Architecture:
    """Llama (Touvron et al. 2023) and its kin: Mistral, Qwen2, Qwen3, OLMo."""
    kind, width, num_heads = keys.model_type, keys.count("hidden_size"), keys.count("num_attention_heads")
    num_layers, context_size = keys.count("num_hidden_layers"), keys.count("max_position_embeddings", 2048)
    d_key = keys.count("head_dim", 128 if kind == "qwen3" else width // num_heads)
    keys.expect("hidden_act", {"silu": "silu", "swish": "silu"}, "silu")
    bias = keys.expect("attention_bias", {True: "all", False: "none"}, False)
    if keys.expect("mlp_bias", {True: True, False: False}, False):
        bias = "all"
    norm = {"norm": "rms", "norm_epsilon": keys.take("rms_norm_eps", 1e-6)}
    windows = _windows(keys, num_layers, context_size) if kind in ("mistral", "qwen2", "qwen3") else {}
    settings = ModelConfig.model_validate(
        {
            "embedding_size": width,
            "context_size": context_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_key_value_heads": keys.count("num_key_value_heads", num_heads),
            "d_key": d_key,
            "d_value": d_key,
            "d_ff": keys.count("intermediate_size"),
            "feedforward": "swiglu",
            "bias": "qkv" if kind == "qwen2" else bias,
            "query_key_norm": kind == "qwen3",
            "tie_embeddings": keys.expect("tie_word_embeddings", {True: True, False: False}, False),
            **({"norm": "layer_plain", "norm_epsilon": 1e-5} if kind == "olmo" else norm),
            **_rotation(keys),
            **windows,
        }
    )
    return Architecture(keys.count("vocab_size"), settings, {ours: Source(name) for ours, name in LLAMA_NAMES.items()})


def _transposed(name: str) -> Source:
    """GPT-2 stores the matrices of `x @ W`."""
    return Source(name, lambda tensor, settings: tensor.t(), lambda parts, settings: parts[0].t())


def _third(name: str, number: int) -> Source:
    """The queries, keys or values of GPT-2's joined projection, (E, 3 E) or (3 E,)."""
    return Source(
        name,
        lambda tensor, settings: tensor.chunk(3, dim=-1)[number].t(),
        lambda parts, settings: torch.cat([part.t() for part in parts], dim=-1),
    )


def _interleaved(name: str, number: int) -> Source:
    """The queries, keys or values of GPT-NeoX's joined projection, whose rows are (H, 3, K)."""

    def arrange(tensor: Tensor, settings: ModelConfig) -> Tensor:
        return tensor.unflatten(0, (settings.num_heads, 3, settings.d_key))[:, number].flatten(0, 1)

    def restore(parts: Sequence[Tensor], settings: ModelConfig) -> Tensor:
        return torch.stack([part.unflatten(0, (settings.num_heads, -1)) for part in parts], dim=1).flatten(0, 2)

    return Source(name, arrange, restore)


def _gpt2(keys: Keys) -> Architecture:
    """GPT-2 (Radford et al. 2019)."""
    width, num_heads = keys.count("n_embd"), keys.count("n_head")
    settings = ModelConfig.model_validate(
        {
            "embedding_size": width,
            "context_size": keys.count("n_positions", 1024),
            "num_layers": keys.count("n_layer"),
            "num_heads": num_heads,
            "d_key": width // num_heads,
            "d_value": width // num_heads,
            "d_ff": keys.count("n_inner", 4 * width),
            "feedforward": keys.expect("activation_function", ACTIVATIONS, "gelu_new"),
            "norm": "layer",
            "norm_epsilon": keys.take("layer_norm_epsilon", 1e-5),
            "bias": "all",
            "tie_embeddings": keys.expect("tie_word_embeddings", {True: True, False: False}, True),
        }
    )
    attention = {part: _third("h.{layer}.attn.c_attn", i) for i, part in enumerate(QKV)}
    sources = {
        "token_embedding": Source("wte"),
        "position_embedding": Source("wpe"),
        "attention_norm": Source("h.{layer}.ln_1"),
        **{f"attention.{part}": source for part, source in attention.items()},
        "attention.output": _transposed("h.{layer}.attn.c_proj"),
        "feedforward_norm": Source("h.{layer}.ln_2"),
        "feedforward.up": _transposed("h.{layer}.mlp.c_fc"),
        "feedforward.down": _transposed("h.{layer}.mlp.c_proj"),
        "final_norm": Source("ln_f"),
        "output_head": Source("lm_head"),
    }
    return Architecture(keys.count("vocab_size"), settings, sources)


def _gpt_neox(keys: Keys) -> Architecture:
    """GPT-NeoX (Black et al. 2022), of which the Pythia models are."""
    width, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    # Versions before `rope_parameters` rotate a quarter by default.
    older = {} if keys.has("rope_parameters") or keys.has("rotary_pct") else {"rotary_fraction": 0.25}
    settings = ModelConfig.model_validate(
        {
            "embedding_size": width,
            "context_size": keys.count("max_position_embeddings", 2048),
            "num_layers": keys.count("num_hidden_layers"),
            "num_heads": num_heads,
            "d_key": width // num_heads,
            "d_value": width // num_heads,
            "d_ff": keys.count("intermediate_size"),
            "feedforward": keys.expect("hidden_act", ACTIVATIONS, "gelu"),
            "norm": "layer",
            "norm_epsilon": keys.take("layer_norm_eps", 1e-5),
            "bias": "all",
            "tie_embeddings": keys.expect("tie_word_embeddings", {True: True, False: False}, False),
            "parallel_blocks": keys.expect("use_parallel_residual", {True: True, False: False}, True),
            **_rotation(keys),
            **older,
        }
    )
    keys.expect("attention_bias", {True: True, False: False}, True)  # missing biases are zero
    joined = {part: _interleaved("layers.{layer}.attention.query_key_value", i) for i, part in enumerate(QKV)}
    sources = {
        "token_embedding": Source("embed_in"),
        "attention_norm": Source("layers.{layer}.input_layernorm"),
        **{f"attention.{part}": source for part, source in joined.items()},
        "attention.output": Source("layers.{layer}.attention.dense"),
        "feedforward_norm": Source("layers.{layer}.post_attention_layernorm"),
        "feedforward.up": Source("layers.{layer}.mlp.dense_h_to_4h"),
        "feedforward.down": Source("layers.{layer}.mlp.dense_4h_to_h"),
        "final_norm": Source("final_layer_norm"),
        "output_head": Source("embed_out"),
    }
    return Architecture(keys.count("vocab_size"), settings, sources)


def _gpt_neo(keys: Keys) -> Architecture:
    """GPT-Neo (Black et al. 2021), of which the TinyStories models are; its scores are not scaled."""
    width, num_heads, num_layers = keys.count("hidden_size"), keys.count("num_heads"), keys.count("num_layers")
    window, context_size = keys.count("window_size", 256), keys.count("max_position_embeddings", 2048)
    types, layers = keys.take("attention_types", []), keys.take("attention_layers", None)
    if layers is None:
        layers = [kind for kinds, count in types for _ in range(count) for kind in kinds]
    kinds = {"global": None, "local": window if window < context_size else None}
    if len(layers) != num_layers or any(kind not in kinds for kind in layers):
        raise keys.wrong("attention_layers", layers, f"{num_layers} of global or local")
    windows = [kinds[kind] for kind in layers]
    settings = ModelConfig.model_validate(
        {
            "embedding_size": width,
            "context_size": context_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "d_key": width // num_heads,
            "d_value": width // num_heads,
            "d_ff": keys.count("intermediate_size", 4 * width),
            "feedforward": keys.expect("activation_function", ACTIVATIONS, "gelu_new"),
            "norm": "layer",
            "norm_epsilon": keys.take("layer_norm_epsilon", 1e-5),
            "bias": "all",
            "tie_embeddings": keys.expect("tie_word_embeddings", {True: True, False: False}, True),
            "attention_scale": 1.0,
            "attention_windows": windows if any(windows) else None,
        }
    )
    sources = {
        "token_embedding": Source("wte"),
        "position_embedding": Source("wpe"),
        "attention_norm": Source("h.{layer}.ln_1"),
        **{f"attention.{part}": Source(f"h.{{layer}}.attn.attention.{part[0]}_proj") for part in QKV},
        "attention.output": Source("h.{layer}.attn.attention.out_proj"),
        "feedforward_norm": Source("h.{layer}.ln_2"),
        "feedforward.up": Source("h.{layer}.mlp.c_fc"),
        "feedforward.down": Source("h.{layer}.mlp.c_proj"),
        "final_norm": Source("ln_f"),
        "output_head": Source("lm_head"),
    }
    return Architecture(keys.count("vocab_size"), settings, sources)


def _lumiere(keys: Keys) -> Architecture:
    """An export of Lumiere with its own modeling file, of which only the settings are read."""
    values = {name: keys.take(name, field.default) for name, field in ModelConfig.model_fields.items()}
    keys.take("tie_word_embeddings", None)  # the same as `tie_embeddings`; written by `save_pretrained`
    sources = {name: Source(name) for name in ("token_embedding", "position_embedding", "final_norm", "output_head")}
    sources |= {name: Source(f"blocks.{{layer}}.{name}") for name in LLAMA_NAMES if name not in sources}
    return Architecture(keys.count("vocab_size"), ModelConfig.model_validate(values), sources)


QKV = ("query", "key", "value")
READERS: dict[str, Callable[[Keys], Architecture]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "olmo": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gpt_neo": _gpt_neo,
    "lumiere": _lumiere,
}
"""The supported values of `model_type`."""
