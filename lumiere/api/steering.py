"""Steer generation by a direction that was found before: `--steer FILE.safetensors[@layer][*scale]`."""

from typing import TYPE_CHECKING

from lumiere.api.target import parse_indices
from lumiere.persistence.directions import check_fits, load_direction, parse_steer
from lumiere.persistence.loading import OpenedModel

if TYPE_CHECKING:
    from lumiere.generation.steering import Steering

CHECKED_TOKENS = 8
"""New tokens whose logits are compared with full forward passes."""


def open_steering(text: str, opened: OpenedModel) -> "Steering | None":
    """Return the steering that `FILE.safetensors[@layer][*scale]` describes; None at scale 0, which changes nothing.

    Raises:
        LumiereError: It is not of this form, the file holds no direction of this model, or there is no such layer.
    """
    from lumiere.generation.steering import Steering

    path, layers, scale = parse_steer(text)
    direction = load_direction(path)
    check_fits(direction, opened, path)
    given = direction.origin.layer if layers is None else layers
    chosen = parse_indices(given, opened.model.num_layers, "layer")
    if scale == 0:
        return None
    first = int(opened.tokenizer.start_id is not None)
    return Steering({layer: direction.step(layer, scale) for layer in chosen}, first)
