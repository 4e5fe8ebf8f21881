"""A faster step for one stream on a CPU, where a token is mostly the dispatch of operations, not arithmetic.

`Transformer.final_residual` with a cache computes the same function in 3.4 times the CPU time. Here the
matrices that read the same vector are joined, the gains of the norms are multiplied into them, everything is stored in
the layout in which it is read, and the views of every position are made once. docs/performance.md has the measurement.

Shapes: E embedding_size, H head, K d_key, V d_value, F d_ff, C context_size, W joined width of a position's queries,
keys and values.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.components.layers import Block, KVCache, rotation_at
from lumiere.models.transformer import Transformer


class FusedLayer(NamedTuple):
    """The matrices of a block, each to be multiplied from the right."""

    joined: Tensor
    """(E, W): queries, keys and values, with the gain of the norm before them."""
    output: Tensor
    """(H V, E)."""
    gate_up: Tensor
    """(E, 2 F), with the gain of the norm before them."""
    down: Tensor
    """(F, E)."""


FAST = {
    "norm": "rms", "feedforward": "swiglu", "rotary_fraction": 1.0, "attention_windows": None, "attention_scale": None,
    "num_key_value_heads": None, "bias": "none", "parallel_blocks": False, "query_key_norm": False,
}  # fmt: skip
"""The settings of the models that `OneStream` computes."""


def has_fast_step(model: Transformer) -> bool:
    """Return whether `OneStream` computes this model: one of the original shape, with any tables of positions."""
    settings = model.settings.model_dump()
    is_plain = all(settings[name] == value for name, value in FAST.items())
    return is_plain and settings["positions"] in ("learned", "rotary") and model.unembedding.device.type == "cpu"


class OneStream:
    """Steps of one row at a time, with fused copies of a model's weights and a cache of their own.

    The product for a position writes its queries, keys and values side by side straight into the cache, whose keys and
    values are views of those rows: nothing is copied.

    Args:
        model: One that `has_fast_step`, in evaluation mode; later changes of its weights have no effect.
        bias_Vocab: Added to the logits.
    """

    def __init__(self, model: Transformer, bias_Vocab: Tensor) -> None:
        weight = model.token_embedding.weight.detach()
        self._epsilon = model.settings.norm_epsilon
        self._heads, self._d_key, self._d_value = model.num_heads, model.d_key, model.d_value
        self._embedding = weight.clone()
        self._positions, self._rotation, self._order = None, None, None
        if model.position_embedding is not None:
            self._positions = model.position_embedding.weight.detach().clone()
        else:
            half = model.d_key // 2
            tables = rotation_at(torch.arange(model.context_size), model.settings, weight.dtype)
            self._rotation = torch.complex(*(table[..., :half].contiguous() for table in tables))
            # Numbers that turn together, i and i + d_key/2, become neighbors: the two parts of a complex number.
            self._order = torch.stack(torch.arange(model.d_key).chunk(2), dim=-1).flatten()
        with torch.no_grad():
            self._layers = [self._fuse(block) for block in model.blocks]
            self._unembedding = model.readout(weight.dtype)[0].T.contiguous()
        self._bias = bias_Vocab
        width = self._layers[0].joined.shape[1]
        self._rows = [weight.new_zeros(1, model.context_size, width) for _ in self._layers]
        self._views: dict[int, list[tuple[Tensor, ...]]] = {}
        heads = [self._split(rows_1CW) for rows_1CW in self._rows]
        self.cache = KVCache([k for _, k, _ in heads], [v for _, _, v in heads], 0, 0)

    def _fuse(self, block: Block) -> FusedLayer:
        attention, feedforward, norm = block.attention, block.feedforward, block.feedforward_norm
        assert feedforward is not None
        assert norm is not None
        query, key = attention.query.weight, attention.key.weight
        if self._order is not None:
            query, key = (
                x.unflatten(0, (self._heads, self._d_key))[:, self._order].flatten(0, 1) for x in (query, key)
            )
        joined, _ = block.attention_norm.folded(torch.cat([query, key, attention.value.weight]))
        # An even width, so that the pairs of every row can be viewed as complex numbers.
        joined = torch.cat([joined, joined.new_zeros(len(joined) % 2, joined.shape[1])])
        gate_up, _ = norm.folded(feedforward.joined_weight())
        matrices = (joined, attention.output.weight, gate_up, feedforward.down.weight)
        return FusedLayer(*(matrix.detach().T.contiguous() for matrix in matrices))

    def _split(self, rows_1TW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys (1, H, T, K) and values (1, H, T, V), as views."""
        keys, values = self._heads * self._d_key, self._heads * self._d_value
        q, k, v = rows_1TW[..., : 2 * keys + values].split([keys, keys, values], dim=-1)
        q, k, v = (x.unflatten(-1, (self._heads, -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def ordinary_keys(self) -> list[Tensor]:
        """Return the keys of `cache` in the order of `Attention`."""
        return [keys if self._order is None else keys[..., self._order.argsort()] for keys in self.cache.keys]

    def reorder(self, num_positions: int) -> None:
        """Bring the keys that a forward pass has written into `cache` into the order of this class."""
        if self._order is not None:
            for keys in self.cache.keys:
                keys[:, :, :num_positions] = keys[:, :, :num_positions, self._order]

    def step(self, token: int, position: int) -> Tensor:
        """Append a token at `position`; return the logits of the next, (1, Vocab).

        The scale of a norm is a number, not a tensor, and applied by the product: `s (x W)` instead of `(s x) W`.
        """
        resid_1E = self._embedding[token : token + 1]
        if self._positions is not None:
            resid_1E = resid_1E + self._positions[position : position + 1]
        else:
            resid_1E = resid_1E.clone()
        resid_E = resid_1E[0]
        size, epsilon = resid_E.shape[0], self._epsilon
        views = self._views.get(position)
        if views is None:
            views = self._views[position] = [self._view(layer, position) for layer in range(len(self._layers))]
        for row, q, k, v, pairs, turn, branches, gate, up, joined, output, gate_up, down in views:
            scale = 1 / math.sqrt(torch.dot(resid_E, resid_E).item() / size + epsilon)
            torch.addmm(row, resid_1E, joined, beta=0, alpha=scale, out=row)
            if self._rotation is not None:
                pairs.mul_(turn)
            z_1H1V = F.scaled_dot_product_attention(q, k, v)
            resid_1E.addmm_(z_1H1V.reshape(1, -1), output)
            scale = 1 / math.sqrt(torch.dot(resid_E, resid_E).item() / size + epsilon)
            torch.addmm(branches, resid_1E, gate_up, beta=0, alpha=scale, out=branches)
            resid_1E.addmm_(F.silu(gate, inplace=True).mul_(up), down)
        scale = 1 / math.sqrt(torch.dot(resid_E, resid_E).item() / size + epsilon)
        return torch.addmm(self._bias, resid_1E, self._unembedding, alpha=scale)

    def _view(self, layer: int, position: int) -> tuple[Tensor, ...]:
        """Return what `step` needs of a layer at a position: making a view takes as long as a small product."""
        rows_CW = self._rows[layer][0]
        row = rows_CW[position : position + 1]
        q, _, _ = self._split(row[None])
        _, k, v = self._split(rows_CW[None, : position + 1])
        pairs, turn = row, row
        if self._rotation is not None:
            num_turned = 2 * self._heads * self._d_key
            pairs = torch.view_as_complex(row[0, :num_turned].view(2 * self._heads, -1, 2))
            turn = self._rotation[position]
        branches = row.new_empty(1, self._layers[layer].gate_up.shape[1])
        gate, up = branches.chunk(2, dim=-1)
        return (row, q, k, v, pairs, turn, branches, gate, up, *self._layers[layer])
