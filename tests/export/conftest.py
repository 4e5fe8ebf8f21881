"""Small models in which every weight has an effect."""

from typing import Any

import pytest
import torch

from lumiere.data.tokenizer import Tokenizer
from lumiere.export import transformer_lens
from lumiere.export.original import Original
from lumiere.models.transformer import Transformer
from tests.models import build

HELD: dict[str, dict[str, Any]] = {
    name: variant
    for name, variant in build.VARIANTS.items()
    if name in ("card", "rotary", "layer norm, biases", "plain norm, geglu", "attention only", "slower rotations")
} | {
    "slow rotations": build.VARIANTS["slow rotations"] | {"d_value": 8},
    "sequential gpt neox": build.VARIANTS["gpt neox"] | {"parallel_blocks": False, "d_key": 8, "d_value": 8},
    "grouped queries": build.VARIANTS["grouped queries"] | {"query_key_norm": False},
    "one head of keys, relu": {"num_key_value_heads": 1, "feedforward": "relu", "attention_scale": 0.3},
}
"""Values of every setting that an export to TransformerLens can hold."""


def make_model(**changes: Any) -> Transformer:
    """Two layers, three heads of width 6, context 12, vocabulary 31; large random weights and gains."""
    sizes = {"vocab_size": 31, "embedding_size": 8, "context_size": 12, "d_key": 6, "d_value": 6, "d_ff": 10}
    torch.manual_seed(1)
    return build.make_model(0.5, **{**sizes, "padding_id": 2, **changes})


TOKENIZER = Tokenizer.train(["Once upon a time there was a small house upon a hill."] * 2, 270, 2)


def make_original(**changes: Any) -> Original:
    """Return a model of `make_model` with a tokenizer that has fewer ids than the model has rows."""
    model = make_model(**{"vocab_size": 280, **changes})
    return Original(model, TOKENIZER, {"run": "run_x", "step": 7})


@pytest.fixture
def without_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide TransformerLens, which takes seconds to start."""
    monkeypatch.setattr(transformer_lens, "installed_version", lambda: None)
