"""Activations of a text, kept while it is generated.

Shapes: T position, S position of a key.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from lumiere.components.hooks import Hook, Place, matching_names, with_place
from lumiere.models.transformer import Transformer

HIDDEN = {"hook_attn_scores": -torch.inf, "hook_pattern": 0.0}
"""What these have where a key comes after the query; their axes are H, T and S."""


class Recorder:
    """Collects the activations of one text from the passes of a decoder.

        recorder = Recorder(model, ["blocks.*.hook_resid_post"])
        with hooked(model, recorder.hooks):
            ...  # generate one text
        recorder.activations()

    Where the window slides, the activations are computed again and collected anew.

    Args:
        patterns: Names of hook points, or patterns of `matching_names`.

    Raises:
        LumiereError: No name matches one of them.
    """

    def __init__(self, model: Transformer, patterns: Iterable[str]) -> None:
        self._parts: dict[str, list[Tensor]] = {name: [] for name in matching_names(model, patterns)}
        self.start = 0
        """Position in the text of the first activation: 0 unless the window has slid."""
        self.num_positions = 0

    @property
    def hooks(self) -> Mapping[str, Hook]:
        """What to set on the model."""
        return {name: with_place(partial(self._keep, name)) for name in self._parts}

    def _keep(self, name: str, activation: Tensor, place: Place) -> None:
        if len(activation) > 1:
            raise ValueError(f"the activations of one text can be kept, not of {len(activation)} texts at once")
        if place.positions[0, 0] == 0:
            self._parts[name].clear()
            self.start = int(place.starts[0, 0])
        self.num_positions = int(place.positions[0, -1]) + 1
        self._parts[name].append(activation[0].clone())

    def activations(self) -> dict[str, Tensor]:
        """Return the activations by name, as one full forward pass over the last window has them, without its batch.

        The last token of a text that ended for its length was not read, and has none.
        """
        return {name: _join(parts, HIDDEN.get(name.rpartition(".")[2])) for name, parts in self._parts.items()}


def _join(parts: list[Tensor], hidden: float | None) -> Tensor:
    """Join along the positions; fill the columns of keys that were not there yet with `hidden`."""
    if hidden is None:
        return torch.cat(parts)
    num_keys = parts[-1].shape[-1]
    wide = [torch.nn.functional.pad(part, (0, num_keys - part.shape[-1]), value=hidden) for part in parts]
    return torch.cat(wide, dim=1)
