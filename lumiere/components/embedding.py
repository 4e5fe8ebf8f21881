"""The token embedding, which is also the output head (weight tying, Press & Wolf 2017).

Shapes: B batch, T position, E embedding_size, Vocab vocab_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """One table of vectors, read by row on the way in and multiplied by on the way out.

    Args:
        vocab_size: rows, one a token.
        embedding_size: width of a row.
    """

    def __init__(self, vocab_size: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, embedding_size))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Each token's row, (B, T, E)."""
        return F.embedding(tokens_BT, self.weight)

    def unembed(self, residual_BTE: Tensor) -> Tensor:
        """The dot product with every row: logits, (B, T, Vocab)."""
        return F.linear(residual_BTE, self.weight)
