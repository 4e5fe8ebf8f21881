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
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.components.kernels import EPSILON
from lumiere.components.layers import Attention, rotation_at
from lumiere.models.transformer import Transformer


class Decoder(Protocol):
    """Rows of text that grow by a token at a time. Each has a window of its own: neighbours do not matter."""

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these texts, each of at least one token; the logits of each row's next token, (B, V)."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; the logits of each row's next token, (B, V), valid until the next call."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may be named more than once."""
        ...


def first_window(tokens: Sequence[int], context_size: int) -> list[int]:
    """What the model sees of a text that it is to continue: its last `context_size` tokens."""
    return list(tokens[-context_size:])


def kept_when_full(window: Sequence[int], context_size: int) -> list[int]:
    """What stays of a full window before the next token is appended: its last `context_size // 2` tokens."""
    return list(window[len(window) - context_size // 2 :])


def suppression(vocab_size: int, suppressed: Collection[int], like: Tensor) -> Tensor:
    """What to add to logits, (V,): minus infinity for the ids that never come, zero for the others."""
    bias_V = like.new_zeros(vocab_size)
    bias_V[list(suppressed)] = -torch.inf
    return bias_V


class FullForward:
    """The slow decoder: `model.logits` over each row's whole window, every time. What the cache is checked against.

    Args:
        model: in evaluation mode.
        suppressed: ids that never come.
    """

    def __init__(self, model: Transformer, suppressed: Collection[int] = ()) -> None:
        self._model = model
        self._like = next(model.parameters())
        self._suppressed = suppressed
        self._windows: list[list[int]] = []

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._windows = [first_window(row, self._model.context_size) for row in rows]
        return self._logits()

    def step(self, tokens: Sequence[int]) -> Tensor:
        context_size = self._model.context_size
        for i, token in enumerate(tokens):
            window = self._windows[i]
            self._windows[i] = [
                *(kept_when_full(window, context_size) if len(window) == context_size else window),
                token,
            ]
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self._windows = [self._windows[row] for row in rows]

    @torch.no_grad()
    def _logits(self) -> Tensor:
        device = self._like.device
        logits = [self._model.logits(torch.tensor([window], device=device))[0, -1] for window in self._windows]
        logits_BV = torch.stack(logits)
        return logits_BV + suppression(logits_BV.shape[-1], self._suppressed, logits_BV)


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


def compiled_step(warn: Callable[[str], None] | None = None) -> StepRows:
    """`step_rows` compiled; where that fails, it says so and goes on without.

    Args:
        warn: called with the reason, once: no C++ compiler, for example.
    """
    fast: StepRows | None = None
    works = True

    def step(
        folded: Folded, caches: Sequence[KeysAndValues], tokens_B: Tensor, lengths_B: Tensor, columns: int
    ) -> Tensor:
        nonlocal fast, works
        if works:
            try:
                fast = fast or torch.compile(step_rows, dynamic=False)
                return fast(folded, caches, tokens_B, lengths_B, columns)
            except Exception as error:  # torch raises many kinds, none of them documented
                works = False
                if warn is not None:
                    reason = str(error).strip().partition("\n")[0]
                    warn(f"torch.compile does not work here, generation goes on without it: {reason}")
        # A step that failed half-way has written nothing to the caches that this does not write again.
        return step_rows(folded, caches, tokens_B, lengths_B, columns)

    return step


ALLOWED = {torch.float64: 1e-10}
ALLOWED_ELSEWHERE = 1e-4


@dataclass(frozen=True)
class CacheCheck:
    """How far the two are apart.

    Attributes:
        num_steps: logits compared.
        difference: the largest between two logits, by the size of the largest logit where that is more than 1.
        allowed: the difference that rounding explains.
    """

    num_steps: int
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


def check_cache(decoder: Decoder, slow: Decoder, prompt: Sequence[int], tokens: Sequence[int]) -> CacheCheck:
    """Write `tokens` after `prompt` again with both decoders, and compare their logits at each step.

    Args:
        decoder: the one with a cache.
        slow: `FullForward`, whose windows slide by the same rule.
    """
    difference, dtype = 0.0, torch.float32
    for i in range(len(tokens) + 1):
        ours, theirs = (
            (each.start([prompt]) if i == 0 else each.step([tokens[i - 1]])).cpu() for each in (decoder, slow)
        )
        dtype = theirs.dtype
        is_open = theirs > -torch.inf
        if not torch.equal(is_open, ours > -torch.inf):
            return CacheCheck(i + 1, float("inf"), ALLOWED.get(dtype, ALLOWED_ELSEWHERE))
        ours, theirs = ours[is_open], theirs[is_open]
        difference = max(difference, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    return CacheCheck(len(tokens) + 1, difference, ALLOWED.get(dtype, ALLOWED_ELSEWHERE))
