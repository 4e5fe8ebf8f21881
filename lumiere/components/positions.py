"""How a token knows where it stands: a learned embedding of each position, or rotary queries and keys.

Shapes: B batch, T position, E embedding_size, H head, K d_key.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


class LearnedPositions(nn.Module):
    """A learned vector for each position, to be added to the token embeddings.

    Args:
        context_size: number of positions.
        embedding_size: width of a vector.
    """

    def __init__(self, context_size: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context_size, embedding_size))

    def forward(self, positions_T: Tensor) -> Tensor:
        """Each position's vector, (T, E)."""
        return F.embedding(positions_T, self.weight)


class Rotation(NamedTuple):
    """Cosines and sines that turn queries and keys, both (T, 1, K): one row a position, the same for all heads."""

    cos: Tensor
    sin: Tensor


def rotation_at(positions_T: Tensor, d_key: int, dtype: torch.dtype) -> Rotation:
    """The rotations of RoPE (Su et al. 2021, equation 34) at `positions_T`.

    Pair i of a query or key turns by `position * 10000^(-2i / d_key)`. The pairs are (i, i + d_key/2), the "half-split"
    convention of Llama in `transformers`; the paper's pairs are neighbours, the same up to a permutation.

    Args:
        positions_T: whole numbers from 0, of any shape that ends in T.
        d_key: width of queries and keys, even.
        dtype: of the tables; float32 or wider, because an angle grows with the position.
    """
    exponents = torch.arange(0, d_key, 2, dtype=dtype, device=positions_T.device) / d_key
    angles = positions_T[..., None].to(dtype) / ROTARY_BASE**exponents
    angles_T1K = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return Rotation(angles_T1K.cos(), angles_T1K.sin())


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys, turned by their position; same shape and dtype."""
    first, second = x_BTHK.chunk(2, dim=-1)
    quarter_turn_BTHK = torch.cat([-second, first], dim=-1)
    return (x_BTHK * rotation.cos + quarter_turn_BTHK * rotation.sin).to(x_BTHK.dtype)
