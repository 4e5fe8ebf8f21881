"""A model's weights, arranged so that a token takes few operations.

At width 128 a step on a CPU is mostly the dispatch of operations, not arithmetic. So whatever can be done once is done
here: the matrices that read the same vector are joined, the gains of the norms are multiplied into them, everything is
stored the way round in which it is read. The function is the same, up to rounding.

Shapes: V vocabulary, E embedding_size, H head, K d_key, F d_ff, W the joined width of a position's queries, keys and
values, Z the joined width of the heads' values, C context_size.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lumiere.components.attention import Attention
from lumiere.components.positions import rotation_at
from lumiere.generation.window import suppression
from lumiere.models.transformer import Transformer


class FoldedLayer(NamedTuple):
    """The matrices of a block, each to be multiplied from the right."""

    joined: Tensor
    """(E, W): queries, keys and values, with the gain of the norm before them."""
    output: Tensor
    """(Z, E)."""
    gate_up: Tensor
    """(E, 2 F), with the gain of the norm before them."""
    down: Tensor
    """(F, E)."""


@dataclass(frozen=True)
class Folded:
    """A model's weights, copied.

    Attributes:
        embedding: each token's vector, (V, E).
        positions: each position's vector, to be added to it, (C, E); None where positions are rotary.
        rotation: cosine and sine that turn each pair of numbers of a query or key, (C, 1, K/2, 2), or None.
        unembedding: to the logits, with the gain of the final norm, (E, V).
        bias: minus infinity at the ids that never come, (V,).
    """

    context_size: int
    num_heads: int
    d_key: int
    d_value: int
    embedding: Tensor
    positions: Tensor | None
    rotation: Tensor | None
    layers: tuple[FoldedLayer, ...]
    unembedding: Tensor
    bias: Tensor

    @property
    def joined_size(self) -> int:
        """W: queries, keys, values, and a number that is not used where their sum is odd."""
        return self.layers[0].joined.shape[1]

    @property
    def num_weights(self) -> int:
        """Numbers that a step reads."""
        return self.unembedding.numel() + sum(matrix.numel() for layer in self.layers for matrix in layer)


@torch.no_grad()
def fold(model: Transformer, suppressed: Collection[int] = ()) -> Folded:
    """The weights of `model`; later changes of the model do not reach them."""
    embedding = model.token_embedding.weight.detach().clone()
    attention = model.blocks[0].attention
    is_rotary = model.positions == "rotary"
    order = _neighbours(attention) if is_rotary else None
    rotation = None
    if is_rotary:
        positions_C = torch.arange(model.context_size, device=embedding.device)
        tables = rotation_at(positions_C, model.d_key, embedding.dtype)
        half = model.d_key // 2
        rotation = torch.stack([tables.cos[..., :half], tables.sin[..., :half]], dim=-1)
    layers = []
    for block in model.blocks:
        attention, feedforward = block.attention, block.feedforward
        query, key = attention.query.weight, attention.key.weight
        if order is not None:
            query, key = query[order], key[order]
        joined = torch.cat([query, key, attention.value.weight]) * block.attention_norm.weight
        # An even width, so that the pairs of every position's row can be seen as complex numbers.
        joined = torch.cat([joined, joined.new_zeros(len(joined) % 2, joined.shape[1])])
        gate_up = torch.cat([feedforward.gate.weight, feedforward.up.weight]) * block.feedforward_norm.weight
        matrices = (joined, attention.output.weight, gate_up, feedforward.down.weight)
        layers.append(FoldedLayer(*(matrix.detach().T.contiguous() for matrix in matrices)))
    return Folded(
        context_size=model.context_size,
        num_heads=attention.num_heads,
        d_key=attention.d_key,
        d_value=attention.d_value,
        embedding=embedding,
        positions=None if model.position_embedding is None else model.position_embedding.weight.detach().clone(),
        rotation=rotation,
        layers=tuple(layers),
        unembedding=(embedding * model.final_norm.weight).T.contiguous(),
        bias=suppression(len(embedding), suppressed, embedding),
    )


def _neighbours(attention: Attention) -> Tensor:
    """The order of a head's rows that brings together what is turned together: i and i + d_key/2 become neighbours.

    Queries and keys change alike, so their products do not.
    """
    rows_HK = torch.arange(attention.num_heads * attention.d_key).view(attention.num_heads, attention.d_key)
    return torch.stack(rows_HK.chunk(2, dim=-1), dim=-1).flatten()
