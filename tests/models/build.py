"""Small models with random weights, and the same weights in `transformers`."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lumiere.models.transformer import Transformer

ROTARY: dict[str, Any] = {"positions": "rotary"}
# Of the wavelengths 6, 35, 199 and 1,117 the first stays, the second is between, and two are four times as long.
LLAMA3 = {"type": "llama3", "factor": 4.0, "original_context_size": 60}
VARIANTS: dict[str, dict[str, Any]] = {
    "card": {},
    "rotary": ROTARY,
    "layer norm, biases": {"norm": "layer", "bias": "all", "feedforward": "gelu_tanh", "tie_embeddings": False},
    "plain norm, geglu": {"norm": "layer_plain", "feedforward": "geglu", "positions": "sinusoidal", "bias": "qkv"},
    "gated biases": {"bias": "all", "norm_epsilon": 1e-2, "attention_scale": 1.0},
    "attention only": {"norm": "none", "feedforward": "none", "positions": "none", "tie_embeddings": False},
    "gpt neox": {
        "norm": "layer", "bias": "all", "feedforward": "gelu", "parallel_blocks": True, "tie_embeddings": False,
        "positions": "rotary", "rotary_fraction": 0.5, "rotary_base": 100.0,
    },
    "grouped queries": ROTARY | {"num_heads": 6, "num_key_value_heads": 2, "query_key_norm": True, "bias": "qkv"},
    "one head of keys, relu": {"num_key_value_heads": 1, "feedforward": "relu", "attention_windows": [None, 3]},
    "slow rotations": ROTARY | {"d_key": 8, "rotary_base": 1000.0, "rotary_scaling": LLAMA3},
    "slower rotations": ROTARY | {"rotary_scaling": {"type": "linear", "factor": 3.0}},
    "windows, rotary": ROTARY | {"attention_windows": [2, 4], "parallel_blocks": True},
}  # fmt: skip
"""Every value of every setting that changes the forward pass."""
FEW_VARIANTS = ("card", "layer norm, biases", "attention only", "gpt neox", "grouped queries")
EACH_VARIANT = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW_VARIANTS)) for name in VARIANTS]
"""Names for a test that takes long: most variants run with the slow tests."""
NAMES = {
    "token_embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "feedforward": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


def make_model(std: float = 0.3, **changes: Any) -> Transformer:
    """Return a model in evaluation mode, with d_value unlike d_key and weights so large that every part matters."""
    sizes: dict[str, Any] = {"vocab_size": 13, "embedding_size": 12, "context_size": 9, "num_layers": 2, "num_heads": 3}
    sizes |= {"d_key": 4, "d_value": 5, "d_ff": 20, "dropout": 0.0}
    model = Transformer(**(sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def stock_llama(model: Transformer, **settings: Any) -> Any:
    """Return the Llama of `transformers` with the weights of a rotary model."""
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embedding_size,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        head_dim=model.d_key,
        max_position_embeddings=model.context_size,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        attention_bias=False,
        **settings,
    )
    llama = LlamaForCausalLM(config).eval()
    weights = {
        ".".join(NAMES.get(part, part) for part in name.split(".")): value for name, value in model.state_dict().items()
    }
    problems = llama.load_state_dict(weights, strict=False)
    assert (problems.missing_keys, problems.unexpected_keys) == (["lm_head.weight"], [])
    return llama
