"""Hook points: read or replace activations inside a `with` block.

A `HookPoint` marks a place in the model's forward pass. Its public name is that of TransformerLens, so that knowledge
and scripts carry over; the module's own path follows Lumiere's names.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import Tensor, nn

from lumiere.errors import LumiereError

Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation; returns its replacement, or None to leave it as it is."""

# Where a module's name differs from TransformerLens's name for the same part.
PUBLIC_NAMES = {"attention": "attn", "feedforward": "mlp", "final_norm": "ln_final"}


class HookPoint(nn.Module):
    """The identity, with a slot, set by `hooked`, for a function that reads or replaces the activation."""

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


@contextmanager
def hooked(
    model: nn.Module, hooks: Mapping[str, Hook], points: Mapping[str, HookPoint] | None = None
) -> Iterator[None]:
    """Set hooks inside a `with` block.

        with hooked(model, {"blocks.1.attn.hook_z": torch.zeros_like}):
            output = model(tokens)

    Args:
        hooks: Functions `activation -> replacement` by public name; None leaves the activation as it is.
        points: `hook_points(model)`, if known.

    Raises:
        LumiereError: A name is unknown; a point already has a hook; or a hook was never called inside the block,
            which would pass off a plain result as an intervention.
        ValueError: A replacement's shape differs from the activation's.
    """
    points = hook_points(model) if points is None else points
    for name in hooks:
        if name not in points:
            matches = get_close_matches(name, points, n=3)
            hint = f"did you mean {' or '.join(matches)}?" if matches else "hook_points(model) lists all names"
            raise LumiereError(f"no hook point '{name}'", hint)
        if points[name].hook is not None:
            hint = "a point takes one function: combine the two into one"
            raise LumiereError(f"hook point '{name}' already has a hook", hint)
    fired: set[str] = set()
    try:
        for name, hook in hooks.items():
            points[name].hook = partial(_call_checked, name, hook, fired)
        yield
    finally:
        for name in hooks:
            points[name].hook = None
    # Reached only if the block raised nothing, so this does not mask an error from inside.
    if silent := [name for name in hooks if name not in fired]:
        names = ", ".join(map(repr, silent))
        raise LumiereError(f"no activation reached {names}", "run the model inside the with block")


def _call_checked(name: str, hook: Hook, fired: set[str], activation: Tensor) -> Tensor | None:
    fired.add(name)
    replacement = hook(activation)
    # A smaller tensor would broadcast further down and change more than was meant.
    if replacement is not None and replacement.shape != activation.shape:
        raise ValueError(
            f"the hook on '{name}' returned shape {tuple(replacement.shape)} "
            f"for an activation of shape {tuple(activation.shape)}"
        )
    return replacement


def run_with_cache(
    model: nn.Module, tokens_BT: Tensor, names: Iterable[str] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Run `model(tokens_BT)` and keep activations.

    Args:
        names: Public names of the hook points to keep. Default: all.

    Returns:
        The model's output, and the activations by public name in the order in which they were computed. Gradients flow
        through them; `torch.no_grad()` around the call saves that memory.

    Raises:
        LumiereError: As `hooked`.
    """
    cache: dict[str, Tensor] = {}
    points = hook_points(model)  # found once: finding them takes as long as all hooks
    # The lambda keeps the activation and returns None.
    hooks = {name: lambda x, name=name: cache.update({name: x}) for name in (points if names is None else names)}
    with hooked(model, hooks, points):
        output = model(tokens_BT)
    return output, cache
