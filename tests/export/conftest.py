"""Small models in which every weight has an effect."""

from collections.abc import Callable

import pytest
import torch

from lumiere.export import transformer_lens
from lumiere.models.transformer import Transformer

MakeModel = Callable[..., Transformer]


@pytest.fixture
def make_model() -> MakeModel:
    """Two layers, three heads of width 6, context 12, vocabulary 31; large random weights and gains."""

    def make(**settings: object) -> Transformer:
        sizes = {"vocab_size": 31, "embedding_size": 8, "context_size": 12, "num_layers": 2, "num_heads": 3}
        torch.manual_seed(1)
        model = Transformer(**{**sizes, "d_key": 6, "d_value": 6, "d_ff": 10, "padding_id": 2, **settings}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
        return model

    return make


@pytest.fixture
def without_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide TransformerLens, which takes seconds to start."""
    monkeypatch.setattr(transformer_lens, "installed_version", lambda: None)
