"""Where each head of each layer looks.

Shapes: L layer, H head, T position (destination), S position (source).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.interpret.result import Receipt, Result, rounding
from lumiere.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class AttentionPatterns(Result):
    """The attention weights of a text.

    Attributes:
        tokens: (T,) the ids that the model was given.
        layers: (L,) the layers, counted from 0.
        heads: (H,) the heads of each layer, counted from 0.
        patterns: (L, H, T, S); row t says how much token t takes from each token s.
    """

    tokens: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    patterns: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for layer, head, destination in np.ndindex(*self.patterns.shape[:3]):
            for source in range(destination + 1):
                yield {
                    "layer": self.layers[layer],
                    "head": self.heads[head],
                    "destination": destination,
                    "source": source,
                    "weight": float(self.patterns[layer, head, destination, source]),
                }


def attention_patterns(
    model: Transformer, tokens: Sequence[int], layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> AttentionPatterns:
    """softmax(q k^T / sqrt(d_key)) under the causal mask.

    Vaswani et al. 2017, "Attention Is All You Need", equation 1. A weight says where information is taken from,
    not what it does there (Jain & Wallace 2019, "Attention is not Explanation").

    Args:
        model: in evaluation mode.
        tokens: (T,) ids, at most `context_size` of them.
        layers: which layers (None: all).
        heads: which heads of each (None: all).
    """
    layers = range(model.num_layers) if layers is None else layers
    heads = range(model.num_heads) if heads is None else heads
    device = next(model.parameters()).device
    with torch.inference_mode():
        output = model(torch.tensor([list(tokens)], device=device))
    patterns = output.attention_weights[0][list(layers)][:, list(heads)].cpu().numpy()
    row_sums = patterns.sum(-1, dtype=np.float64)
    return AttentionPatterns(
        tokens=tuple(tokens),
        layers=tuple(layers),
        heads=tuple(heads),
        patterns=patterns,
        receipts=(
            Receipt("rows sum to 1", float(np.abs(row_sums - 1).max()), rounding(model)),
            Receipt("no weight on a later token", float(np.triu(patterns, k=1).max()), 0.0),
        ),
    )
