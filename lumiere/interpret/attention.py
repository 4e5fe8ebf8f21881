"""Where each head of each layer looks.

Shapes: L layer, H head, T position (destination), S position (source).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class AttentionPatterns:
    """The attention weights of a text.

    Attributes:
        tokens: (T,) the ids that the model was given.
        patterns: (L, H, T, S) float32; row t says how much token t takes from each token s.
        row_sum_error: how far a row's sum is from 1 at most.
        future_weight: the largest weight that a token gives to a later one.
    """

    tokens: tuple[int, ...]
    patterns: np.ndarray
    row_sum_error: float
    future_weight: float

    @property
    def receipts(self) -> dict[str, float]:
        """The invariants of a causal softmax, and by how much each was missed."""
        return {"rows_sum_to_1": self.row_sum_error, "no_weight_on_the_future": self.future_weight}


def attention_patterns(model: Transformer, tokens: Sequence[int]) -> AttentionPatterns:
    """softmax(q k^T / sqrt(d_key)) under the causal mask, of every head.

    Vaswani et al. 2017, "Attention Is All You Need", equation 1. A weight says where information is taken from,
    not what it does there (Jain & Wallace 2019, "Attention is not Explanation").

    Args:
        model: in evaluation mode.
        tokens: (T,) ids, at most `context_size` of them.
    """
    device = next(model.parameters()).device
    with torch.inference_mode():
        output = model(torch.tensor([list(tokens)], device=device))
    patterns = output.attention_weights[0].float().cpu().numpy()
    return AttentionPatterns(
        tokens=tuple(tokens),
        patterns=patterns,
        row_sum_error=float(np.abs(patterns.sum(-1, dtype=np.float64) - 1).max()),
        future_weight=float(np.triu(patterns, k=1).max()),
    )
