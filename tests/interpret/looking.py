"""A model by chance whose heads look somewhere: with the weights of a fresh one, every pattern is nearly even."""

import torch

from lumiere.config.loader import validate
from lumiere.models.transformer import Transformer, build_model


def looking_model() -> Transformer:
    """Three layers of two heads, in evaluation mode, with large weights."""
    sizes = {"embedding_size": 12, "context_size": 16, "num_layers": 3, "num_heads": 2, "d_key": 5, "d_value": 7}
    torch.manual_seed(1)
    model = build_model(validate({"model": {**sizes, "d_ff": 9, "dropout": 0.5}})).eval()
    for parameter in model.parameters():
        parameter.data *= 20 if parameter.ndim == 2 else 1
    return model
