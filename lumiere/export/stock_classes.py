"""The classes of `transformers` that compute a model, with their config and names of weights.

The importer decides which class that is: a `config.json` is written for each one and read again, and those are left
whose settings are the model's own. So the meaning of keys and the names of weights stand in one place,
`lumiere.importing.architectures`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lumiere.config.schema import ModelConfig
from lumiere.errors import LumiereError
from lumiere.importing.architectures import ACTIVATIONS, Architecture, Source, read_architecture, rope_parameters
from lumiere.models.transformer import Transformer

WITHOUT_EFFECT = {"dropout", "zero_output_init"}
"""Model settings that do not change what trained weights compute."""

Keys = dict[str, Any]
Written = tuple[Keys, tuple[str, ...]]
"""The keys of a `config.json`, and the beginnings of the names of a block's parts that have a bias in that model."""


@dataclass(frozen=True)
class ModelClass:
    """A class of `transformers`.

    Attributes:
        base: The prefix of the names of all tensors but the output head's.
        write: `(settings, biased)` -> what stands in `config.json`, and which parts have a bias; `biased` are the parts
            of blocks whose bias is not zero.
    """

    name: str
    base: str
    write: Callable[[ModelConfig, frozenset[str]], Written]


def _llama_keys(settings: ModelConfig, **keys: Any) -> Keys:
    """Return the keys that Llama and its kin share."""
    return {
        "hidden_size": settings.embedding_size,
        "intermediate_size": settings.d_ff,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.key_value_heads,
        "head_dim": settings.d_key,
        "max_position_embeddings": settings.context_size,
        "tie_word_embeddings": settings.tie_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": settings.norm_epsilon,
        **_rotary_keys(settings),
        **keys,
    }


def _rotary_keys(settings: ModelConfig, **parameters: Any) -> Keys:
    """Return the keys of rotary positions, `rope_parameters` for transformers 5 and the others for older versions."""
    keys = rope_parameters(settings)
    scaling = {name: value for name, value in keys.items() if name != "rope_theta"}
    older = {"rope_theta": settings.rotary_base} | (
        {} if settings.rotary_scaling is None else {"rope_scaling": scaling}
    )
    return older | {"rope_parameters": keys | parameters}


def _llama(settings: ModelConfig, biased: frozenset[str]) -> Written:
    attention, feedforward = (any(part.startswith(kind) for part in biased) for kind in ("attention", "feedforward"))
    biases = ("attention.",) * attention + ("feedforward.",) * feedforward
    return _llama_keys(settings, attention_bias=attention, mlp_bias=feedforward), biases


def _mistral(settings: ModelConfig, biased: frozenset[str]) -> Written:
    return _llama_keys(settings, sliding_window=next(iter(settings.attention_windows or ()), None)), ()


def _window_keys(settings: ModelConfig) -> Keys:
    windows = settings.attention_windows or [None] * settings.num_layers
    return {
        "use_sliding_window": any(windows),
        "sliding_window": next(filter(None, windows), None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _qwen2(settings: ModelConfig, biased: frozenset[str]) -> Written:
    return _llama_keys(settings, **_window_keys(settings)), ("attention.query", "attention.key", "attention.value")


def _qwen3(settings: ModelConfig, biased: frozenset[str]) -> Written:
    attention = any(part.startswith("attention") for part in biased)
    return _llama_keys(settings, attention_bias=attention, **_window_keys(settings)), ("attention.",) * attention


def _olmo(settings: ModelConfig, biased: frozenset[str]) -> Written:
    keys, biases = _qwen3(settings, biased)
    for name in ("rms_norm_eps", *_window_keys(settings)):
        del keys[name]
    return keys, biases


def _activation(settings: ModelConfig) -> str | None:
    return {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(settings.feedforward)


def _gpt2(settings: ModelConfig, biased: frozenset[str]) -> Written:
    keys = {
        "n_embd": settings.embedding_size,
        "n_positions": settings.context_size,
        "n_layer": settings.num_layers,
        "n_head": settings.num_heads,
        "n_inner": settings.d_ff,
        "activation_function": _activation(settings),
        "layer_norm_epsilon": settings.norm_epsilon,
        "tie_word_embeddings": settings.tie_embeddings,
    }
    return keys, ("attention.", "feedforward.")


def _gpt_neox(settings: ModelConfig, biased: frozenset[str]) -> Written:
    keys = {
        "hidden_size": settings.embedding_size,
        "intermediate_size": settings.d_ff,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "max_position_embeddings": settings.context_size,
        "tie_word_embeddings": settings.tie_embeddings,
        "hidden_act": _activation(settings),
        "layer_norm_eps": settings.norm_epsilon,
        "use_parallel_residual": settings.parallel_blocks,
        "attention_bias": True,
        "rotary_pct": settings.rotary_fraction,
        "rotary_emb_base": settings.rotary_base,
        **_rotary_keys(settings, partial_rotary_factor=settings.rotary_fraction),
    }
    return keys, ("attention.", "feedforward.")


def _gpt_neo(settings: ModelConfig, biased: frozenset[str]) -> Written:
    windows = settings.attention_windows or [None] * settings.num_layers
    kinds = ["local" if window else "global" for window in windows]
    keys = {
        "hidden_size": settings.embedding_size,
        "intermediate_size": settings.d_ff,
        "num_layers": settings.num_layers,
        "num_heads": settings.num_heads,
        "max_position_embeddings": settings.context_size,
        "window_size": next(filter(None, windows), 256),
        "attention_types": [[[kind], 1] for kind in kinds],
        "attention_layers": kinds,
        "activation_function": _activation(settings),
        "layer_norm_epsilon": settings.norm_epsilon,
        "tie_word_embeddings": settings.tie_embeddings,
    }
    return keys, ("attention.output", "feedforward.")


CLASSES = {
    "llama": ModelClass("LlamaForCausalLM", "model.", _llama),
    "mistral": ModelClass("MistralForCausalLM", "model.", _mistral),
    "qwen2": ModelClass("Qwen2ForCausalLM", "model.", _qwen2),
    "qwen3": ModelClass("Qwen3ForCausalLM", "model.", _qwen3),
    "olmo": ModelClass("OlmoForCausalLM", "model.", _olmo),
    "gpt2": ModelClass("GPT2LMHeadModel", "transformer.", _gpt2),
    "gpt_neox": ModelClass("GPTNeoXForCausalLM", "gpt_neox.", _gpt_neox),
    "gpt_neo": ModelClass("GPTNeoForCausalLM", "transformer.", _gpt_neo),
}
"""By `model_type`. Of several that hold a model with equally many biases, the first is taken."""


def effective(settings: ModelConfig) -> Keys:
    """Return the settings that change what trained weights compute, each in one form; without `bias`."""
    values = settings.model_dump(exclude=WITHOUT_EFFECT | {"bias"})
    values["num_key_value_heads"] = settings.key_value_heads
    values["attention_scale"] = settings.attention_scale or settings.d_key**-0.5
    windows = settings.attention_windows or [None] * settings.num_layers
    values["attention_windows"] = [
        None if (window or settings.context_size) >= settings.context_size else window for window in windows
    ]
    values["rotary_fraction"] = settings.rotary_size
    if not settings.rotary_size:
        del values["rotary_base"], values["rotary_scaling"]
    return values


@dataclass(frozen=True)
class Stock:
    """A model as one of the classes.

    Attributes:
        biases: The beginnings of the names of a block's parts that have a bias.
        theirs: Where the class has our tensors.
    """

    model_type: str
    keys: Keys
    biases: tuple[str, ...]
    theirs: Architecture

    @property
    def class_name(self) -> str:
        return CLASSES[self.model_type].name


def find_stock(model: Transformer, excluded: Collection[str] = ()) -> Stock | None:
    """Return the model as the class that computes it, with the fewest additional biases; None if there is none.

    Args:
        excluded: Values of `model_type` that are not tried.
    """
    if model.embedding_size % model.num_heads:
        return None  # configs of transformers refuse it, although heads have a width of their own
    weights = model.state_dict()
    parts = {split_name(module)[1] for module in map(module_of, weights) if is_linear(module)}
    biased = frozenset(
        split_name(module_of(name))[1]
        for name, weight in weights.items()
        if name.endswith(".bias") and is_linear(module_of(name)) and weight.any()
    )
    found: list[tuple[int, Stock]] = []
    for model_type in [name for name in CLASSES if name not in excluded]:
        keys, biases = CLASSES[model_type].write(model.settings, biased)
        try:
            theirs = read_architecture({"model_type": model_type, "vocab_size": model.vocab_size} | keys)
        except LumiereError:
            continue  # the class has no such model
        with_bias = {part for part in parts if part.startswith(biases)}
        if effective(theirs.settings) == effective(model.settings) and biased <= with_bias:
            found.append((len(with_bias - biased), Stock(model_type, keys, biases, theirs)))
    return min(found, key=lambda pair: pair[0], default=(0, None))[1]


def stock_weights(model: Transformer, stock: Stock) -> dict[str, Tensor]:
    """Return the weights by the names of a class; biases that the model lacks are zero."""
    ours, base = model.state_dict(), CLASSES[stock.model_type].base
    joined: dict[str, tuple[Source, list[Tensor]]] = {}

    def place(module: str, kind: str, weight: Tensor) -> None:
        layer, part = split_name(module)
        source = stock.theirs.sources[part]
        name = f"{'' if part == 'output_head' else base}{source.name.format(layer=layer)}.{kind}"
        joined.setdefault(name, (source, []))[1].append(weight)

    for name, weight in ours.items():
        module, kind = module_of(name), name.rpartition(".")[2]
        if not is_linear(module):
            place(module, kind, weight)
        elif kind == "weight":
            place(module, kind, weight)
            if split_name(module)[1].startswith(stock.biases):
                place(module, "bias", ours.get(f"{module}.bias", weight.new_zeros(len(weight))))
    return {name: source.restore(parts, model.settings).contiguous() for name, (source, parts) in joined.items()}


def module_of(name: str) -> str:
    """Return the module that a tensor belongs to."""
    return name.rpartition(".")[0]


def split_name(module: str) -> tuple[str, str]:
    """Return the layer of a module and its name there; the layer is empty outside of the blocks."""
    if not module.startswith("blocks."):
        return "", module
    _, layer, part = module.split(".", 2)
    return layer, part


def is_linear(module: str) -> bool:
    """Return whether a module is a part of a block to which `ModelConfig.bias` applies."""
    return module.startswith("blocks.") and "norm" not in module
