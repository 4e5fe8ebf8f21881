"""Decoders: what turns rows of tokens into the logits of their next tokens, with a key/value cache or without.

The window slides in steps. Learned positions end at `context_size`, so a text that grows past it must lose its
beginning, and then everything left stands at other positions and is computed again. Losing one token at a time would
make every token cost a whole window. So when the window is full, its last `context_size // 2` tokens are kept: one
window of work for every half window of text.

Shapes: B rows, T position, H head, C context_size, K d_key, V d_value or vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lumiere.components.layers import KVCache
from lumiere.generation.one_stream import OneStream
from lumiere.models.transformer import Transformer

# Multiplications of a step below which a second thread costs more than it saves.
ONE_THREAD_MULTIPLICATIONS = 2**24

Step = Callable[[Transformer, KVCache, Tensor], Tensor]


class Decoder(Protocol):
    """Rows of text that grow by one token at a time. Each has its own window, independent of its neighbors."""

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these texts, each of at least one token; return the logits of each row's next token, (B, V)."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; return the next logits, (B, V), valid until the next call."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; a row may appear more than once."""
        ...


def first_window(tokens: Sequence[int], context_size: int) -> list[int]:
    """Return what the model sees of a prompt: its last `context_size` tokens."""
    return list(tokens[-context_size:])


def kept_when_full(window: Sequence[int], context_size: int) -> list[int]:
    """Return what stays of a full window before the next token: its last `context_size // 2` tokens."""
    return list(window[len(window) - context_size // 2 :])


def suppression(vocab_size: int, suppressed: Collection[int], like: Tensor) -> Tensor:
    """Return what to add to logits, (V,): -inf for the suppressed ids, 0 for the others."""
    bias_V = like.new_zeros(vocab_size)
    bias_V[list(suppressed)] = -torch.inf
    return bias_V


class FullForward:
    """The reference decoder: `model.logits` over each row's whole window, every time.

    Args:
        model: In evaluation mode.
        suppressed: Ids that are never generated.
    """

    def __init__(self, model: Transformer, suppressed: Collection[int] = ()) -> None:
        self._model = model
        self._bias = suppression(model.vocab_size, suppressed, model.token_embedding.weight.detach())
        self._windows: list[list[int]] = []

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._windows = [first_window(row, self._model.context_size) for row in rows]
        return self._logits()

    def step(self, tokens: Sequence[int]) -> Tensor:
        context_size = self._model.context_size
        for i, (window, token) in enumerate(zip(self._windows, tokens, strict=True)):
            kept = kept_when_full(window, context_size) if len(window) == context_size else window
            self._windows[i] = [*kept, token]
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self._windows = [self._windows[row] for row in rows]

    @torch.no_grad()
    def _logits(self) -> Tensor:
        windows = (torch.tensor([window], device=self._bias.device) for window in self._windows)
        return torch.stack([self._model.logits(window_1T)[0, -1] for window_1T in windows]) + self._bias


class CachedDecoder:
    """A `Decoder` that keeps the keys and values of each row's window: a token costs one position of work.

    One stream on a CPU takes the steps of `OneStream`.

    Args:
        model: In evaluation mode; its weights are copied.
        suppressed: Ids that are never generated.
        compiled_step: A compiled `step_rows`, which then makes all steps, at a fixed number of rows.
    """

    def __init__(self, model: Transformer, suppressed: Collection[int] = (), compiled_step: Step | None = None) -> None:
        self._model = model = copy_to_generate(model)
        self._compiled_step = compiled_step
        self._weight = model.token_embedding.weight.detach()
        self._unembedding = self._weight.T.contiguous()
        self._bias = suppression(model.vocab_size, suppressed, self._weight)
        self._num_weights = sum(parameter.numel() for parameter in model.parameters())
        self._fused: OneStream | None = None
        self._one_stream: OneStream | None = None
        self._cache = KVCache([], [], 0, 0)
        self._num_cached = 0
        self._windows: list[list[int]] = []

    @torch.inference_mode()
    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._windows = [first_window(row, self._model.context_size) for row in rows]
        self._allocate(len(rows))
        return self._logits_after(self._encode(range(len(rows))))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        context_size = self._model.context_size
        full = [i for i, window in enumerate(self._windows) if len(window) == context_size]
        for i in full:
            self._windows[i] = kept_when_full(self._windows[i], context_size)
        if full and context_size > 1:
            self._encode(full, fill_only=True)
        lengths = [len(window) for window in self._windows]
        for window, token in zip(self._windows, tokens, strict=True):
            window.append(token)
        with few_threads(self._num_weights * self._num_cached):
            if self._one_stream is not None:
                return self._one_stream.step(tokens[0], lengths[0])
            unused = [0] * (self._num_cached - len(tokens))
            if self._compiled_step is None and len(set(lengths)) == 1:
                self._cache.lengths = lengths[0]
            else:
                self._cache.lengths = torch.tensor([*lengths, *unused], device=self._weight.device)
            self._cache.num_keys = max(lengths) + 1 if self._compiled_step is None else context_size
            tokens_B = torch.tensor([*tokens, *unused], device=self._weight.device)
            step = self._compiled_step or step_rows
            return self._logits_after(step(self._model, self._cache, tokens_B)[: len(tokens)])

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        self._windows = [list(self._windows[row]) for row in rows]
        if self._one_stream is not None and len(rows) == 1:
            return
        # A compiled step is made for one number of rows; unused rows are computed and dropped.
        unused = self._num_cached - len(rows) if self._compiled_step is not None else 0
        index = torch.tensor([*rows, *[0] * unused], device=self._weight.device)
        keys = self._cache.keys if self._one_stream is None else self._one_stream.ordinary_keys()
        kept = [tensor[index] for tensor in (*keys, *self._cache.values)]
        self._allocate(len(index))
        for tensor, part in zip((*self._cache.keys, *self._cache.values), kept, strict=True):
            tensor.copy_(part)
        if self._one_stream is not None:
            self._one_stream.reorder(self._model.context_size)

    def _allocate(self, num_rows: int) -> None:
        model = self._model
        is_one_stream = num_rows == 1 and self._weight.device.type == "cpu" and self._compiled_step is None
        if is_one_stream:
            self._fused = self._fused or OneStream(model, self._bias)
            self._one_stream, self._cache = self._fused, self._fused.cache
        elif self._one_stream is not None or num_rows != self._num_cached:
            self._one_stream = None
            shapes = [(num_rows, model.num_heads, model.context_size, width) for width in (model.d_key, model.d_value)]
            keys, values = ([self._weight.new_zeros(shape) for _ in model.blocks] for shape in shapes)
            self._cache = KVCache(keys, values, 0, 0)
        self._num_cached = num_rows

    def _encode(self, rows: Sequence[int], fill_only: bool = False) -> Tensor:
        """Fill the cache with the windows of `rows`; return the final residual stream after each, (B, E)."""
        windows, device = [self._windows[row] for row in rows], self._weight.device
        num_positions = max(map(len, windows))
        # No token sees what stands to the right of a shorter row: attention is causal, and later steps overwrite it.
        padded = [window + [0] * (num_positions - len(window)) for window in windows]
        cache, index = KVCache(self._cache.keys, self._cache.values, 0, num_positions), None
        if len(rows) < self._num_cached:
            index = torch.tensor(list(rows), device=device)
            keys, values = (
                [x.new_empty(len(rows), x.shape[1], num_positions, x.shape[3]) for x in tensors]
                for tensors in (cache.keys, cache.values)
            )
            cache = KVCache(keys, values, 0, num_positions)
        with few_threads(self._num_weights * len(rows) * num_positions):
            tokens_BT = torch.tensor(padded, device=device)
            final_BTE = self._model.final_residual(tokens_BT, cache=cache, fill_only=fill_only)
        if index is not None:
            for x, part in zip((*self._cache.keys, *self._cache.values), (*cache.keys, *cache.values), strict=True):
                x[index, :, :num_positions] = part
        if self._one_stream is not None:
            self._one_stream.reorder(num_positions)
        return final_BTE[torch.arange(len(rows)), [len(window) - 1 for window in windows]]

    def _logits_after(self, final_BE: Tensor) -> Tensor:
        with few_threads(self._num_weights * len(final_BE)):
            return torch.addmm(self._bias, final_BE, self._unembedding)


@torch.no_grad()
def copy_to_generate(model: Transformer) -> Transformer:
    """Return a copy of the model whose layers keep their joined weights, all stored in the layout of `x @ W`.

    For few tokens, joining the weights would take longer than the products.
    """
    model = deepcopy(model)
    for block in model.blocks:
        for part in (block.attention, block.feedforward):
            part.joined = part.joined_weight().T.contiguous().T
        for linear in (block.attention.output, block.feedforward.down):
            linear.weight.data = linear.weight.T.contiguous().T
    for module in model.modules():
        # As plain attributes: torch's own lookup takes a quarter of a step's dispatch.
        vars(module).update({**module._modules, **module._parameters})
    return model


def step_rows(model: Transformer, cache: KVCache, tokens_B: Tensor) -> Tensor:
    """Append a token to each row of `cache`; return the final residual stream, (B, E)."""
    return model.final_residual(tokens_B[:, None], cache=cache)[:, 0]


def compiled_step(warn: Callable[[str], None] | None = None) -> Step:
    """Return `step_rows` compiled; where that fails, it warns once and continues without.

    Args:
        warn: Called with the reason: no C++ compiler, for example.
    """
    fast: Step | None = None
    works = True

    def step(model: Transformer, cache: KVCache, tokens_B: Tensor) -> Tensor:
        nonlocal fast, works
        if works:
            try:
                fast = fast or torch.compile(step_rows, dynamic=False)
                return fast(model, cache, tokens_B)
            except Exception as error:  # torch raises many kinds, none of them documented
                works = False
                if warn is not None:
                    reason = str(error).strip().partition("\n")[0]
                    warn(f"torch.compile does not work here, generation goes on without it: {reason}")
        # A step that failed half-way has written nothing to the cache that this does not write again.
        return step_rows(model, cache, tokens_B)

    return step


@contextmanager
def few_threads(multiplications: int) -> Iterator[None]:
    """Use one thread for small work, where several would wait for each other longer than they compute."""
    num_threads = torch.get_num_threads()
    if multiplications >= ONE_THREAD_MULTIPLICATIONS or num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@dataclass(frozen=True)
class CacheCheck:
    """How far the logits of the cache are from those of full forward passes: `lumiere generate --check`.

    Attributes:
        num_steps: Number of steps compared.
        difference: Largest difference between two logits, relative to the largest logit where that is above 1.
        allowed: The difference that rounding explains.
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
        decoder: The one with a cache.
        slow: `FullForward`, whose windows slide by the same rule.
    """
    difference, allowed = 0.0, 1e-4
    for i in range(len(tokens) + 1):
        ours, theirs = (
            (each.start([prompt]) if i == 0 else each.step([tokens[i - 1]])).cpu() for each in (decoder, slow)
        )
        allowed = 1e-10 if theirs.dtype == torch.float64 else 1e-4
        is_open = theirs > -torch.inf
        if not torch.equal(is_open, ours > -torch.inf):
            return CacheCheck(i + 1, float("inf"), allowed)
        ours, theirs = ours[is_open], theirs[is_open]
        difference = max(difference, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    return CacheCheck(len(tokens) + 1, difference, allowed)
