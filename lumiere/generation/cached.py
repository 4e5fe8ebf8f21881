"""Decoding with a key/value cache: a token costs one row of every product, not a window of them.

One stream on a CPU takes `_step_one`, which spends as few operations as possible: its keys and values are views of the
rows that a product gives for each position, queries, keys and values side by side; so the product writes straight into
the cache, and nothing is copied. All else takes `step_rows`, which `torch.compile` can take too: there keys and values
of a head lie together, as batched products read them.

Shapes: B rows, T position, C context_size, S column of the cache, E embedding_size, H head, K d_key, V d_value or
vocabulary, W joined width.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.components.norm import EPSILON
from lumiere.generation.folding import Folded, FoldedLayer, fold
from lumiere.generation.window import first_window, kept_when_full
from lumiere.models.transformer import Transformer

# Products of a step, in multiplications, below which a second thread costs more than it brings.
ONE_THREAD_MULTIPLICATIONS = 2**24

KeysAndValues = tuple[Tensor, Tensor]
"""Of a layer: (B, H, C, K) and (B, H, C, V)."""
StepRows = Callable[[Folded, Sequence[KeysAndValues], Tensor, Tensor, int], Tensor]


class CachedDecoder:
    """A `Decoder` that keeps the keys and values of each row's window.

    Args:
        model: in evaluation mode; its weights are copied.
        suppressed: ids that never come.
        compiled_step: a compiled `step_rows`, which then makes all steps, at a fixed number of rows.
    """

    def __init__(
        self, model: Transformer, suppressed: Collection[int] = (), compiled_step: StepRows | None = None
    ) -> None:
        self._folded = fold(model, suppressed)
        self._compiled_step = compiled_step
        self._device = self._folded.embedding.device
        self._windows: list[list[int]] = []
        self._caches: list[KeysAndValues] = []
        self._joined: list[Tensor] = []
        self._views: dict[int, list[tuple[Tensor, ...]]] = {}
        self._num_cached = 0
        self._one_stream = False

    @torch.inference_mode()
    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        folded = self._folded
        self._windows = [first_window(row, folded.context_size) for row in rows]
        if self._num_cached != len(rows):
            self._num_cached = len(rows)
            self._allocate()
        with few_threads(folded.num_weights * sum(map(len, self._windows))):
            return self._encode(range(len(rows)), with_logits=True)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        folded = self._folded
        full = [i for i, window in enumerate(self._windows) if len(window) == folded.context_size]
        if full:
            for i in full:
                self._windows[i] = kept_when_full(self._windows[i], folded.context_size)
            if folded.context_size > 1:
                with few_threads(folded.num_weights * len(full) * folded.context_size // 2):
                    self._encode(full, with_logits=False)
        for window, token in zip(self._windows, tokens, strict=True):
            window.append(token)
        with few_threads(folded.num_weights * self._num_cached):
            if self._one_stream:
                return self._step_one(tokens[0], len(self._windows[0]) - 1)
            unused = self._num_cached - len(tokens)
            lengths = [len(window) - 1 for window in self._windows] + [0] * unused
            tokens_B = torch.tensor([*tokens, *[0] * unused], device=self._device)
            lengths_B = torch.tensor(lengths, device=self._device)
            if self._compiled_step is not None:
                logits_BV = self._compiled_step(folded, self._caches, tokens_B, lengths_B, folded.context_size)
            else:
                logits_BV = step_rows(folded, self._caches, tokens_B, lengths_B, max(lengths) + 1)
            return logits_BV[: len(tokens)]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        self._windows = [list(self._windows[row]) for row in rows]
        # A compiled step is made for one number of rows; what falls away is computed and left out.
        filled = [*rows, *[0] * (self._num_cached - len(rows))] if self._compiled_step is not None else list(rows)
        self._num_cached = len(filled)
        index = torch.tensor(filled, device=self._device, dtype=torch.int64)
        kept = [(keys.index_select(0, index), values.index_select(0, index)) for keys, values in self._caches]
        self._allocate()
        for cache, tensors in zip(self._caches, kept, strict=True):
            for target, tensor in zip(cache, tensors, strict=True):
                target.copy_(tensor)

    def _allocate(self) -> None:
        folded, num_rows, num_layers = self._folded, self._num_cached, len(self._folded.layers)
        new_zeros, context_size = folded.embedding.new_zeros, folded.context_size
        self._views = {}
        self._one_stream = num_rows == 1 and self._device.type == "cpu" and self._compiled_step is None
        if self._one_stream:
            self._joined = [new_zeros(1, context_size, folded.joined_size) for _ in range(num_layers)]
            self._caches = [split_heads(joined_1CW, folded)[1:] for joined_1CW in self._joined]
        else:
            keys_shape = (num_rows, folded.num_heads, context_size, folded.d_key)
            values_shape = (num_rows, folded.num_heads, context_size, folded.d_value)
            self._caches = [(new_zeros(keys_shape), new_zeros(values_shape)) for _ in range(num_layers)]

    def _encode(self, rows: Sequence[int], with_logits: bool) -> Tensor:
        """Fill the cache with the windows of `rows`; the logits after each, or nothing."""
        folded = self._folded
        windows = [self._windows[row] for row in rows]
        num_positions = max(map(len, windows))
        # Nobody sees what stands to the right of a shorter row: attention is causal, and later steps overwrite it.
        padded = [window + [0] * (num_positions - len(window)) for window in windows]
        tokens_BT = torch.tensor(padded, device=self._device)
        index = torch.tensor(list(rows), device=self._device)
        resid_BTE = F.embedding(tokens_BT, folded.embedding)
        if folded.positions is not None:
            resid_BTE += folded.positions[:num_positions]
        rotation = None if folded.rotation is None else folded.rotation[:num_positions]
        for (keys, values), layer in zip(self._caches, folded.layers, strict=True):
            joined_BTW = normalized(resid_BTE) @ layer.joined
            q, k, v = split_heads(rotate_pairs(joined_BTW, folded, rotation), folded)
            keys[index, :, :num_positions] = k
            values[index, :, :num_positions] = v
            if layer is folded.layers[-1] and not with_logits:
                return resid_BTE
            z_BTHV = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            resid_BTE = add_parts(resid_BTE, z_BTHV.flatten(-2), layer)
        last_B = torch.tensor([len(window) - 1 for window in windows], device=self._device)
        last_BE = resid_BTE[torch.arange(len(windows), device=self._device), last_B]
        return torch.addmm(folded.bias, normalized(last_BE), folded.unembedding)

    def _step_one(self, token: int, position: int) -> Tensor:
        """`step_rows` for one row, in half the operations.

        The norm's scale is a number and not a tensor, so that the product applies it by the way: `s (x W)` instead of
        `(s x) W`.
        """
        folded = self._folded
        resid_1E = folded.embedding[token : token + 1]
        if folded.positions is not None:
            resid_1E = resid_1E + folded.positions[position : position + 1]
        else:
            resid_1E = resid_1E.clone()
        resid_E = resid_1E[0]
        size = resid_E.shape[0]
        views = self._views.get(position)
        if views is None:
            views = self._views[position] = [self._view(i, position) for i in range(len(folded.layers))]
        for row, q, k, v, pairs, turn, branches, gate, up, joined, output, gate_up, down in views:
            scale = 1 / math.sqrt(torch.dot(resid_E, resid_E).item() / size + EPSILON)
            torch.addmm(row, resid_1E, joined, beta=0, alpha=scale, out=row)
            if folded.rotation is not None:
                pairs.mul_(turn)
            z_1H1V = F.scaled_dot_product_attention(q, k, v)
            resid_1E.addmm_(z_1H1V.reshape(1, -1), output)
            scale = 1 / math.sqrt(torch.dot(resid_E, resid_E).item() / size + EPSILON)
            torch.addmm(branches, resid_1E, gate_up, beta=0, alpha=scale, out=branches)
            resid_1E.addmm_(F.silu(gate, inplace=True).mul_(up), down)
        scale = 1 / math.sqrt(torch.dot(resid_E, resid_E).item() / size + EPSILON)
        return torch.addmm(folded.bias, resid_1E, folded.unembedding, alpha=scale)

    def _view(self, layer_index: int, position: int) -> tuple[Tensor, ...]:
        """All that `_step_one` needs of a layer at a position, since making a view takes as long as a small product."""
        folded, layer = self._folded, self._folded.layers[layer_index]
        joined_CW = self._joined[layer_index][0]
        row = joined_CW[position : position + 1]
        q, _, _ = split_heads(row[None], folded)
        _, k, v = split_heads(joined_CW[None, : position + 1], folded)
        pairs, turn = row, row
        if folded.rotation is not None:
            num_turned = 2 * folded.num_heads * folded.d_key
            pairs = torch.view_as_complex(row[0, :num_turned].view(2 * folded.num_heads, -1, 2))
            turn = torch.view_as_complex(folded.rotation[position])
        branches = row.new_empty(1, layer.gate_up.shape[1])
        gate, up = branches.chunk(2, dim=-1)
        return (row, q, k, v, pairs, turn, branches, gate, up, *layer)


def step_rows(
    folded: Folded, caches: Sequence[KeysAndValues], tokens_B: Tensor, lengths_B: Tensor, num_columns: int
) -> Tensor:
    """Append a token to each row of the caches, and compute the logits of the next, (B, V).

    Args:
        caches: of each layer; changed.
        lengths_B: positions that each row has already.
        num_columns: columns of the cache to look at, more than any length.
    """
    resid_BE = F.embedding(tokens_B, folded.embedding)
    if folded.positions is not None:
        resid_BE = resid_BE + folded.positions[lengths_B]
    rotation = None if folded.rotation is None else folded.rotation[lengths_B]
    rows_B = torch.arange(len(tokens_B), device=tokens_B.device)
    is_hidden_BS = torch.arange(num_columns, device=tokens_B.device) > lengths_B[:, None]
    mask_BS = resid_BE.new_zeros(is_hidden_BS.shape).masked_fill(is_hidden_BS, -torch.inf)
    mask_N1S = mask_BS.repeat_interleave(folded.num_heads, dim=0)[:, None]  # N = B H
    scale = folded.d_key**-0.5
    for (keys, values), layer in zip(caches, folded.layers, strict=True):
        joined_BW = normalized(resid_BE) @ layer.joined
        q, k, v = split_heads(rotate_pairs(joined_BW, folded, rotation)[:, None], folded)
        keys[rows_B, :, lengths_B] = k.squeeze(2)
        values[rows_B, :, lengths_B] = v.squeeze(2)
        # Written out: on a CPU `scaled_dot_product_attention` takes twice the time for a single query.
        keys_NSK, values_NSV = keys[:, :, :num_columns].flatten(0, 1), values[:, :, :num_columns].flatten(0, 1)
        pattern_N1S = torch.baddbmm(mask_N1S, q.flatten(0, 1), keys_NSK.mT, alpha=scale).softmax(-1)
        z_BHV = torch.bmm(pattern_N1S, values_NSV).view(-1, folded.num_heads, folded.d_value)
        resid_BE = add_parts(resid_BE, z_BHV.flatten(-2), layer)
    return torch.addmm(folded.bias, normalized(resid_BE), folded.unembedding)


def normalized(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without its gain."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return x * mean_square.add_(EPSILON).rsqrt_()


def add_parts(resid: Tensor, z: Tensor, layer: FoldedLayer) -> Tensor:
    """The residual stream after a block, of the heads' joined output."""
    resid = resid + z @ layer.output
    gate, up = (normalized(resid) @ layer.gate_up).chunk(2, dim=-1)
    return resid + (F.silu(gate) * up) @ layer.down


def split_heads(joined_BTW: Tensor, folded: Folded) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (B, H, T, K) and values (B, H, T, V), as views."""
    keys, values = folded.num_heads * folded.d_key, folded.num_heads * folded.d_value
    q, k, v = joined_BTW[..., : 2 * keys + values].split([keys, keys, values], dim=-1)
    split = [x.unflatten(-1, (folded.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]
    return split[0], split[1], split[2]


def rotate_pairs(joined: Tensor, folded: Folded, rotation: Tensor | None) -> Tensor:
    """Turn the queries and keys in `joined`, (..., W), whose pairs are neighbours.

    Args:
        rotation: (..., 1, K/2, 2), or None where positions are not rotary.
    """
    if rotation is None:
        return joined
    num_turned = 2 * folded.num_heads * folded.d_key
    real, imaginary = joined[..., :num_turned].unflatten(-1, (2 * folded.num_heads, -1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return torch.cat([turned.flatten(-3), joined[..., num_turned:]], dim=-1)


@contextmanager
def few_threads(multiplications: int) -> Iterator[None]:
    """One thread for small work, on which several wait for each other longer than they compute."""
    num_threads = torch.get_num_threads()
    if multiplications >= ONE_THREAD_MULTIPLICATIONS or num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
