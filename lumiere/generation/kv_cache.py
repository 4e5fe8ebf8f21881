"""Decoders: compute the logits of each row's next token, with a key/value cache or without.

The window slides in steps. Learned positions end at `context_size`, so a longer text loses its beginning, and the rest
is computed again at other positions. Losing one token at a time would cost a whole window per token; therefore a full
window keeps its last `context_size // 2` tokens, which costs one window per half window of text.

Shapes: B rows, T position, E embedding_size, H head, C context_size, K d_key, V d_value or vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lumiere.components.hooks import HookPoint, Place, at_place, functions_set, hook_points
from lumiere.components.layers import Attention, KVCache
from lumiere.generation.one_stream import OneStream, has_fast_step
from lumiere.models.transformer import Transformer

# Multiplications of a step below which a second thread costs more than it saves.
ONE_THREAD_MULTIPLICATIONS = 2**24

Step = Callable[[Transformer, KVCache, Tensor], Tensor]


class Decoder(Protocol):
    """Rows of text that grow by one token at a time, each with its own window."""

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these texts, each of at least one token; return the logits of each row's next token, (B, V)."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; return the next logits, (B, V)."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; a row may appear more than once."""
        ...


def slide(windows: Sequence[list[int]], context_size: int) -> list[int]:
    """Cut the windows that are full to their last `context_size // 2` tokens; return their rows."""
    full = [row for row, window in enumerate(windows) if len(window) == context_size]
    for row in full:
        del windows[row][: num_dropped(context_size)]
    return full


def num_dropped(context_size: int) -> int:
    """Return the number of tokens that a full window loses."""
    return context_size - context_size // 2


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
        self._starts: list[int] = []

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._windows = [list(row[-self._model.context_size :]) for row in rows]
        self._starts = [len(row) - len(window) for row, window in zip(rows, self._windows, strict=True)]
        return self._logits()

    def step(self, tokens: Sequence[int]) -> Tensor:
        for row in slide(self._windows, self._model.context_size):
            self._starts[row] += num_dropped(self._model.context_size)
        for window, token in zip(self._windows, tokens, strict=True):
            window.append(token)
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self._windows = [list(self._windows[row]) for row in rows]
        self._starts = [self._starts[row] for row in rows]

    @torch.no_grad()
    def _logits(self) -> Tensor:
        logits = []
        for window, start in zip(self._windows, self._starts, strict=True):
            window_1T = torch.tensor([window], device=self._bias.device)
            positions_1T = torch.arange(len(window), device=self._bias.device)[None]
            with at_place(Place(positions_1T, positions_1T.new_tensor([[start]]))):
                logits.append(self._model.logits(window_1T)[0, -1])
        return torch.stack(logits) + self._bias


class CachedDecoder:
    """A `Decoder` that keeps the keys and values of each row's window: a token costs one position of work.

    One stream on a CPU takes the steps of `OneStream`, if it has them for the model.

    Hooks on the model act here as in a full forward pass, by the ordinary step: the cache is filled again when they
    change and when a window slides, always for all rows.

    Args:
        model: In evaluation mode; its weights are copied, its hook points are shared.
        suppressed: Ids that are never generated.
        compiled_step: A compiled `step_rows`, which then makes all steps, at a fixed number of rows.
    """

    def __init__(self, model: Transformer, suppressed: Collection[int] = (), compiled_step: Step | None = None) -> None:
        self._model = model = copy_to_generate(model)
        self._compiled_step = compiled_step
        self._weight = model.token_embedding.weight.detach()
        self._unembedding = model.unembedding.detach().T.contiguous()
        self._bias = suppression(model.vocab_size, suppressed, self._weight)
        self._num_weights = sum(parameter.numel() for parameter in model.parameters())
        self._one_stream: OneStream | None = None
        self._cache = KVCache([], [], 0, 0)
        self._num_cached = 0
        self._windows: list[list[int]] = []
        self._starts: list[int] = []
        self._points = list(hook_points(model).values())
        self._hooks: tuple[object, ...] = ()
        self._num_changes = -1

    @cached_property
    def _fused(self) -> OneStream:
        return OneStream(self._model, self._bias)

    def _see_hooks(self) -> bool:
        """Note the functions on the model's hook points; return whether they are others than before."""
        before, self._hooks, self._num_changes = self._hooks, functions_set(self._points), HookPoint.changes
        return self._hooks != before

    @torch.inference_mode()
    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._see_hooks()
        self._windows = [list(row[-self._model.context_size :]) for row in rows]
        self._starts = [len(row) - len(window) for row, window in zip(rows, self._windows, strict=True)]
        self._allocate(len(rows))
        return self._logits(self._encode(range(len(rows))))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        context_size, device = self._model.context_size, self._weight.device
        filled: Sequence[int] = slide(self._windows, context_size)
        for row in filled:
            self._starts[row] += num_dropped(context_size)
        if HookPoint.changes != self._num_changes and self._see_hooks():
            self._allocate(len(self._windows))
            filled = range(len(self._windows))
        elif filled and self._hooks:
            filled = range(len(self._windows))
        if filled and context_size > 1:
            self._encode(filled, fill_only=not self._hooks)
        lengths = [len(window) for window in self._windows]
        for window, token in zip(self._windows, tokens, strict=True):
            window.append(token)
        with few_threads(self._num_weights * self._num_cached):
            if self._one_stream is not None:
                return self._one_stream.step(tokens[0], lengths[0])
            unused = [0] * (self._num_cached - len(tokens))
            tokens_B = torch.tensor([*tokens, *unused], device=device)
            compiled = None if self._hooks else self._compiled_step
            is_compiled = compiled is not None
            has_one_length = not is_compiled and len(set(lengths)) == 1
            self._cache.lengths = lengths[0] if has_one_length else torch.tensor([*lengths, *unused], device=device)
            self._cache.num_keys = context_size if is_compiled else max(lengths) + 1
            step = compiled or step_rows
            with self._at_place(lengths):
                final_BE = step(self._model, self._cache, tokens_B)
            return self._logits(final_BE[: len(tokens)])

    def _at_place(self, firsts: Sequence[int], num_positions: int = 1) -> AbstractContextManager[None]:
        """State where each row of a pass stands, from its position in `firsts` on, for hooks, if there are any."""
        if not self._hooks:
            return nullcontext()
        numbers = firsts, self._starts, map(len, self._windows)
        first_B1, start_B1, length_B1 = (
            torch.tensor(list(row), device=self._weight.device)[:, None] for row in numbers
        )
        positions_BT = first_B1 + torch.arange(num_positions, device=self._weight.device)
        return at_place(Place(positions_BT.where(positions_BT < length_B1, -1), start_B1))

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        self._windows = [list(self._windows[row]) for row in rows]
        self._starts = [self._starts[row] for row in rows]
        if self._one_stream is not None and len(rows) == 1:
            return
        # A compiled step is made for one number of rows; unused rows are computed and dropped.
        has_unused = self._compiled_step is not None and not self._hooks
        unused = self._num_cached - len(rows) if has_unused else 0
        index = torch.tensor([*rows, *[0] * unused], device=self._weight.device)
        keys = self._cache.keys if self._one_stream is None else self._one_stream.ordinary_keys()
        kept = [tensor[index] for tensor in (*keys, *self._cache.values)]
        self._allocate(len(index))
        for tensor, part in zip((*self._cache.keys, *self._cache.values), kept, strict=True):
            tensor.copy_(part)
        if self._one_stream is not None:
            self._one_stream.reorder(self._model.context_size)

    def _allocate(self, num_rows: int) -> None:
        is_plain = self._compiled_step is None and not self._hooks
        if num_rows == 1 and is_plain and has_fast_step(self._model):
            self._one_stream, self._cache = self._fused, self._fused.cache
        elif self._one_stream is not None or num_rows != self._num_cached:
            self._one_stream = None
            self._cache = self._new_cache(num_rows, self._model.context_size)
        self._num_cached = num_rows

    def _new_cache(self, num_rows: int, num_positions: int) -> KVCache:
        num_heads, widths = self._model.settings.key_value_heads, (self._model.d_key, self._model.d_value)
        shapes = [(num_rows, num_heads, num_positions, width) for width in widths]
        keys, values = ([self._weight.new_zeros(shape) for _ in self._model.blocks] for shape in shapes)
        return KVCache(keys, values, 0, num_positions)

    def _encode(self, rows: Sequence[int], fill_only: bool = False) -> Tensor:
        """Fill the cache with the windows of `rows`; return the final residual stream after each, (B, E)."""
        windows, device = [self._windows[row] for row in rows], self._weight.device
        num_positions = max(map(len, windows))
        # No token sees what stands to the right of a shorter row: attention is causal, and later steps overwrite it.
        tokens_BT = torch.tensor([window + [0] * (num_positions - len(window)) for window in windows], device=device)
        is_whole = len(rows) == self._num_cached
        whole = KVCache(self._cache.keys, self._cache.values, 0, num_positions)
        part = whole if is_whole else self._new_cache(len(rows), num_positions)
        with few_threads(self._num_weights * tokens_BT.numel()), self._at_place([0] * len(rows), num_positions):
            final_BTE = self._model.final_residual(tokens_BT, cache=part, fill_only=fill_only)
        if not is_whole:
            index = torch.tensor(list(rows), device=device)
            for tensor, filled in zip((*whole.keys, *whole.values), (*part.keys, *part.values), strict=True):
                tensor[index, :, :num_positions] = filled
        if self._one_stream is not None:
            self._one_stream.reorder(num_positions)
        return final_BTE[torch.arange(len(rows)), [len(window) - 1 for window in windows]]

    def _logits(self, final_BE: Tensor) -> Tensor:
        with few_threads(self._num_weights * len(final_BE)):
            return torch.addmm(self._bias, final_BE, self._unembedding)


@torch.no_grad()
def copy_to_generate(model: Transformer) -> Transformer:
    """Return a copy of the model whose layers keep their joined weights, all stored in the layout of `x @ W`.

    For few tokens, joining the weights would take longer than the products. The copy has the model's own hook points.
    """
    model = deepcopy(model, {id(point): point for point in hook_points(model).values()})
    for block in model.blocks:
        for part in (block.attention, block.feedforward):
            if part is not None:
                part.joined = part.joined_weight().T.contiguous().T
                linear = part.output if isinstance(part, Attention) else part.down
                linear.weight.data = linear.weight.T.contiguous().T
    for module in model.modules():
        # As plain attributes: torch's own lookup takes a quarter of a step's dispatch.
        vars(module).update({**module._modules, **module._parameters})
    return model


def step_rows(model: Transformer, cache: KVCache, tokens_B: Tensor) -> Tensor:
    """Append a token to each row of `cache`; return the final residual stream, (B, E)."""
    return model.final_residual(tokens_B[:, None], cache=cache)[:, 0]


def compiled_step(warn: Callable[[str], None] | None = None) -> Step:
    """Return `step_rows` compiled; if that fails, it warns once and continues uncompiled.

    Args:
        warn: Called with the reason: no C++ compiler, for example.
    """
    current: Step | None = None

    def step(model: Transformer, cache: KVCache, tokens_B: Tensor) -> Tensor:
        nonlocal current
        try:
            current = current or torch.compile(step_rows, dynamic=False)
            return current(model, cache, tokens_B)
        except Exception as error:  # torch raises many kinds, none of them documented
            if current is step_rows:
                raise
            current = step_rows
            if warn is not None:
                reason = str(error).strip().partition("\n")[0]
                warn(f"torch.compile does not work here, continuing without it: {reason}")
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
    """The error of the cached logits against full forward passes: `lumiere generate --check`."""

    num_steps: int
    difference: float
    """Largest difference between two logits, relative to the largest logit where that is above 1."""
    tolerance: float
    """The difference that rounding explains."""

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance


def check_cache(decoder: Decoder, slow: Decoder, prompt: Sequence[int], tokens: Sequence[int]) -> CacheCheck:
    """Generate `tokens` after `prompt` again with both decoders, and compare their logits at each step.

    Args:
        decoder: The one with a cache.
        slow: `FullForward`, whose windows slide by the same rule.
    """
    difference, tolerance = 0.0, 1e-4
    for i in range(len(tokens) + 1):
        ours, theirs = (
            (each.start([prompt]) if i == 0 else each.step([tokens[i - 1]])).cpu() for each in (decoder, slow)
        )
        tolerance = 1e-10 if theirs.dtype == torch.float64 else 1e-4
        is_open = theirs > -torch.inf
        if not torch.equal(is_open, ours > -torch.inf):
            return CacheCheck(i + 1, float("inf"), tolerance)
        ours, theirs = ours[is_open], theirs[is_open]
        difference = max(difference, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    return CacheCheck(len(tokens) + 1, difference, tolerance)
