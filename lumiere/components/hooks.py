"""Reading and changing activations: named identity modules, and `with` blocks that set functions on them.

A `HookPoint` marks a place in the model's forward pass. Its public name is the one TransformerLens gives the same
place, so that knowledge and scripts carry over; the module's own path follows Lumiere's glossary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from lumiere.errors import LumiereError

Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation; returns its replacement, or None to leave it as it is."""

# Where a module's name differs from TransformerLens's name for the same part.
PUBLIC_NAMES = {"attention": "attn", "feedforward": "mlp", "final_norm": "ln_final"}


class HookPoint(nn.Module):
    """The identity, with one slot for a function that looks at the activation or replaces it.

    The slot is set by `hooked` only. A point has no parameters and leaves no trace in the state dict.
    """

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
    """The model's hook points by public name, such as `blocks.0.attn.hook_pattern`."""
    return {
        ".".join(PUBLIC_NAMES.get(part, part) for part in path.split(".")): module
        for path, module in model.named_modules()
        if isinstance(module, HookPoint)
    }


def has_hooks(model: nn.Module) -> bool:
    """Whether a function is set on any hook point of the model."""
    return any(isinstance(module, HookPoint) and module.is_set for module in model.modules())


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Set hooks for the length of a `with` block.

        with hooked(model, {"blocks.1.attn.hook_z": torch.zeros_like}):
            output = model(tokens)

    Args:
        model: any module that holds hook points.
        hooks: for each public name a function `activation -> replacement`; None as replacement only looks.

    Raises:
        LumiereError: a name is unknown; a point already has a hook; or a hook was never called inside the block,
            which would make a result that looks like an intervention and is none.
        ValueError: a replacement has another shape than the activation.
    """
    with _hooked(hook_points(model), hooks):
        yield


@contextmanager
def _hooked(points: Mapping[str, HookPoint], hooks: Mapping[str, Hook]) -> Iterator[None]:
    for name in hooks:
        if name not in points:
            raise _unknown_name(name, points)
        if points[name].hook is not None:
            raise LumiereError(
                f"hook point '{name}' already has a hook", "a point takes one function: combine the two into one"
            )
    fired: set[str] = set()
    try:
        for name, hook in hooks.items():
            points[name].hook = _recorded(name, hook, fired)
        yield
    finally:
        for name in hooks:
            points[name].hook = None
    # Reached only if the block raised nothing: an error from inside is not masked by this one.
    if silent := [name for name in hooks if name not in fired]:
        raise LumiereError(
            f"no activation reached {', '.join(repr(name) for name in silent)}",
            "run the model inside the with block",
        )


def run_with_cache(
    model: nn.Module, tokens_BT: Tensor, names: Iterable[str] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Run the model and keep activations.

    Args:
        model: any module that holds hook points, called as `model(tokens_BT)`.
        tokens_BT: token ids, (B, T).
        names: public names of the hook points to keep; all of them if None.

    Returns:
        The model's output, and the activations by public name in the order in which they were computed. They are not
        detached: gradients flow through them, and `torch.no_grad()` around the call saves that memory.

    Raises:
        LumiereError: as `hooked`.
    """
    cache: dict[str, Tensor] = {}

    def keeper(name: str) -> Hook:
        def keep(activation: Tensor) -> None:
            cache[name] = activation

        return keep

    points = hook_points(model)  # found once, since that takes as long as all hooks
    with _hooked(points, {name: keeper(name) for name in (points if names is None else names)}):
        output = model(tokens_BT)
    return output, cache


def _recorded(name: str, hook: Hook, fired: set[str]) -> Hook:
    """`hook`, noting that it was called and holding its replacement to the activation's shape."""

    def call(activation: Tensor) -> Tensor | None:
        fired.add(name)
        replacement = hook(activation)
        # A smaller tensor would broadcast further down and change more than was meant.
        if replacement is not None and replacement.shape != activation.shape:
            raise ValueError(
                f"the hook on '{name}' returned shape {tuple(replacement.shape)} "
                f"for an activation of shape {tuple(activation.shape)}"
            )
        return replacement

    return call


def _unknown_name(name: str, points: Mapping[str, HookPoint]) -> LumiereError:
    matches = get_close_matches(name, points, n=3)
    hint = f"did you mean {' or '.join(matches)}?" if matches else "hook_points(model) lists all names"
    return LumiereError(f"no hook point '{name}'", hint)
