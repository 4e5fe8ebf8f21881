"""Hook points: read or replace activations inside a `with` block.

A `HookPoint` marks a place in the model's forward pass. Its public name is that of TransformerLens, so that knowledge
and scripts carry over; the module's own path follows Lumiere's names.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lumiere.errors import LumiereError, nearest

Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation; returns its replacement, or None to leave it as it is."""

# Where a module's name differs from TransformerLens's name for the same part.
PUBLIC_NAMES = {"attention": "attn", "feedforward": "mlp", "final_norm": "ln_final"}


class Place(NamedTuple):
    """Where the activations that a hook sees stand, for `with_place`."""

    positions: Tensor
    """(B, T) in the model's window, from 0; -1 where a shorter row of a batch has ended."""
    starts: Tensor
    """(B, 1) tokens of the text before the window: 0 until a text is longer than the window."""

    @property
    def in_text(self) -> Tensor:
        """(B, T) positions in the whole text; -1 where a shorter row has ended."""
        return torch.where(self.positions < 0, self.positions, self.positions + self.starts)


_place: ContextVar[Place | None] = ContextVar("place", default=None)


@contextmanager
def at_place(place: Place) -> Iterator[None]:
    """State where the activations stand that the model computes inside a `with` block, as decoders do."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


@dataclass(frozen=True)
class with_place:  # noqa: N801 (used like a decorator)
    """A hook that is also told where the activations stand: `function(activation, place)`.

    In generation with a cache, a hook sees the new positions alone. An edit that depends on `place` is the same there
    as in a full forward pass, where the positions are 0 to T - 1.
    """

    function: Callable[[Tensor, Place], Tensor | None]

    def __call__(self, activation: Tensor, axis: int = 1) -> Tensor | None:
        """Call the function.

        Args:
            axis: That of the positions.
        """
        place = _place.get()
        if place is None:
            num_rows, num_positions = len(activation), activation.shape[axis]
            positions_T = torch.arange(num_positions, device=activation.device)
            place = Place(positions_T.expand(num_rows, -1), positions_T.new_zeros(num_rows, 1))
        return self.function(activation, place)


class HookPoint(nn.Module):
    """The identity, with a slot, set by `hooked`, for a function that reads or replaces the activation."""

    changes: ClassVar[int] = 0
    """How often `hooked` has set or removed functions, at any point: whether to look at all of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.hook: Hook | None = None

    @property
    def is_set(self) -> bool:
        """Whether a function is set, by `hooked` or by torch's own `register_*_hook`."""
        return bool(self.hook is not None or self._forward_hooks or self._forward_pre_hooks or self._backward_hooks)

    def __call__(self, activation: Tensor) -> Tensor:
        # A module's own call takes four times as long as these checks, which are written out because a property counts.
        if self.hook is not None or self._forward_hooks or self._forward_pre_hooks or self._backward_hooks:
            return super().__call__(activation)
        return activation

    def forward(self, activation: Tensor) -> Tensor:
        if self.hook is None:
            return activation
        replacement = self.hook(activation)
        return activation if replacement is None else replacement


def hook_points(model: nn.Module) -> dict[str, HookPoint]:
    """Return the model's hook points by public name, such as `blocks.0.attn.hook_pattern`."""
    return {
        ".".join(PUBLIC_NAMES.get(part, part) for part in path.split(".")): module
        for path, module in model.named_modules()
        if isinstance(module, HookPoint)
    }


def has_hooks(model: nn.Module) -> bool:
    """Return whether a function is set on any hook point of the model."""
    return any(isinstance(module, HookPoint) and module.is_set for module in model.modules())


def functions_set(points: Iterable[HookPoint]) -> tuple[object, ...]:
    """Return the functions on hook points with their places: equal as long as the same ones are set."""
    return tuple(
        (number, point.hook, *point._forward_hooks.values(), *point._forward_pre_hooks.values())
        for number, point in enumerate(points)
        if point.is_set
    )


def matching_names(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Return the names of hook points that match any of the patterns, in the model's order.

    Args:
        patterns: Names, in which `*` stands for any characters, `?` for one and `[01]` for one of these.

    Raises:
        LumiereError: No name matches one of them.
    """
    return _matching_names(list(hook_points(model)), patterns)


def _matching_names(names: list[str], patterns: Iterable[str]) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            is_part = any(pattern in name for name in names)
            guess = f"*{pattern}*" if is_part else nearest(pattern.replace("*", "0"), names)
            raise LumiereError(
                f"no hook point is called {pattern!r}",
                f"did you mean {guess}?" if guess else "lumiere inspect cache lists all names; * stands for any part",
            )
        found |= matches
    return [name for name in names if name in found]


@contextmanager
def hooked(
    model: nn.Module,
    hooks: Mapping[str, Hook | Sequence[Hook]],
    points: Mapping[str, HookPoint] | None = None,
) -> Iterator[None]:
    """Set hooks inside a `with` block.

        with hooked(model, {"blocks.*.attn.hook_z": torch.zeros_like}):
            output = model(tokens)

    Several functions at a point, from one block or from nested ones, run in the order in which they were set; each
    takes what the one before returned. They act in generation too, where they see the new positions alone: `with_place`
    tells a function which ones.

    Args:
        hooks: Functions `activation -> replacement` by public name, or by a pattern of `matching_names`; None leaves
            the activation as it is.
        points: `hook_points(model)`, if known.

    Raises:
        LumiereError: No name matches; or a hook was never called inside the block, which would pass off a plain result
            as an intervention.
        ValueError: A replacement's shape differs from the activation's.
    """
    points = hook_points(model) if points is None else points
    names, fired = list(points), set[str]()
    added: list[tuple[str, Hook]] = [
        (name, _Checked(name, function, fired))
        for pattern, functions in hooks.items()
        for name in ([pattern] if pattern in points else _matching_names(names, [pattern]))
        for function in ([functions] if callable(functions) else functions)
    ]
    before = {name: points[name].hook for name, _ in added}
    HookPoint.changes += 1
    try:
        for name, function in added:
            earlier = points[name].hook
            points[name].hook = function if earlier is None else _InTurn(earlier, function)
        yield
    finally:
        for name, hook in before.items():
            points[name].hook = hook
        HookPoint.changes += 1
    # Reached only if the block raised nothing, so this does not mask an error from inside.
    if silent := [name for name in before if name not in fired]:
        raise LumiereError(
            f"no activation reached {', '.join(map(repr, silent))}", "run the model inside the with block"
        )


@dataclass(frozen=True)
class _InTurn:
    """Two hooks at a point, equal to another pair of the same ones."""

    first: Hook
    second: Hook

    def __call__(self, activation: Tensor) -> Tensor | None:
        replacement = self.first(activation)
        again = self.second(activation if replacement is None else replacement)
        return replacement if again is None else again


@dataclass(frozen=True)
class _Checked:
    """A hook, noted when it is called, whose replacement must have the activation's shape."""

    name: str
    hook: Hook
    fired: set[str] = field(compare=False)

    def __call__(self, activation: Tensor) -> Tensor | None:
        self.fired.add(self.name)
        # Of scores and patterns, (B, H, T, S), the queries' positions.
        is_square = self.name.endswith(("hook_attn_scores", "hook_pattern"))
        hook = self.hook
        replacement = hook(activation, 2) if isinstance(hook, with_place) and is_square else hook(activation)
        # A smaller tensor would broadcast further down and change more than was meant.
        if replacement is not None and replacement.shape != activation.shape:
            raise ValueError(
                f"the hook on '{self.name}' returned shape {tuple(replacement.shape)} "
                f"for an activation of shape {tuple(activation.shape)}"
            )
        return replacement


def run_with_cache(
    model: nn.Module, tokens_BT: Tensor, names: Iterable[str] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Run `model(tokens_BT)` and keep activations.

    Args:
        names: Public names of the hook points to keep, or patterns. Default: all.

    Returns:
        The model's output, and the activations by public name in the order in which they were computed. Gradients flow
        through them; `torch.no_grad()` around the call saves that memory.

    Raises:
        LumiereError: As `hooked`.
    """
    cache: dict[str, Tensor] = {}
    points = hook_points(model)  # found once: finding them takes as long as all hooks
    kept = list(points) if names is None else _matching_names(list(points), names)
    # The lambda keeps the activation and returns None.
    hooks = {name: lambda x, name=name: cache.update({name: x}) for name in kept}
    with hooked(model, hooks, points):
        output = model(tokens_BT)
    return output, cache


def run_with_gradients(
    model: nn.Module, tokens_BT: Tensor, metric: Callable[[Any], Tensor], names: Iterable[str]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run `model(tokens_BT)`; return a metric, the activations, and the metric's gradient for each of them.

    Args:
        metric: Maps the model's output to a scalar.
        names: Public names of the hook points, or patterns.

    Returns:
        The metric, the activations and the gradients, both by public name and of the same shapes. The gradient is zero
        where the metric does not depend on the activation. Weights get no gradients.

    Raises:
        LumiereError: As `hooked`.
    """
    cache: dict[str, Tensor] = {}

    def keep(name: str, activation: Tensor) -> Tensor:
        # A leaf if nothing before it has a gradient, as in a frozen model.
        cache[name] = activation if activation.requires_grad else activation.detach().requires_grad_()
        return cache[name]

    with torch.enable_grad():
        with hooked(model, {name: partial(keep, name) for name in matching_names(model, names)}):
            value = metric(model(tokens_BT))
        gradients = torch.autograd.grad(value, list(cache.values()), materialize_grads=True)
    activations = {name: activation.detach() for name, activation in cache.items()}
    return value.detach(), activations, dict(zip(cache, gradients, strict=True))
