"""The activations of a model on a text, by the names of its hook points.

Shapes: T position (destination), S position (source), E embedding_size, H head, K d_key, V d_value, F d_ff.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.components.hooks import hook_points, matching_names, run_with_cache
from lumiere.interpret.result import Receipt, Result, one_sequence, relative_error, rounding
from lumiere.models.transformer import Transformer

AXES: Mapping[str, str] = {
    "hook_q": "T H K",
    "hook_k": "T H K",
    "hook_v": "T H V",
    "hook_z": "T H V",
    "hook_attn_scores": "H T S",
    "hook_pattern": "H T S",
    "hook_pre": "T F",
    "hook_pre_linear": "T F",
    "hook_post": "T F",
    "hook_scale": "T 1",
}
"""By the last part of a name, where they are not `T E`."""
TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class Activations(Result):
    """The activations of a text by name. Tables and JSON list them without their values.

    Attributes:
        tokens: (T,) the ids that the model was given.
        names: as TransformerLens has them, such as `blocks.0.attn.hook_pattern`, in the order of the computation.
        axes: what each axis of each is, such as `H T S`.
        shapes: the lengths of these axes.
        num_bytes: of each.
        values: by name.
    """

    tokens: tuple[int, ...]
    names: tuple[str, ...]
    axes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_bytes: tuple[int, ...]
    values: Mapping[str, np.ndarray]

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(self.values)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().as_dict().items() if name != "values"}

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for name, axes, shape, size in zip(self.names, self.axes, self.shapes, self.num_bytes, strict=True):
            yield {"name": name, "axes": axes, "shape": " ".join(map(str, shape)), "num_bytes": size}


def activations(model: Transformer, tokens: Sequence[int], patterns: Sequence[str] = ("*",)) -> Activations:
    """Return the activations whose names match any of `patterns`.

    Two invariants are checked: the embeddings and the outputs of the parts sum to the residual stream (Elhage et al.
    2021, "A Mathematical Framework for Transformer Circuits"), and the logits are the same with and without hooks.

    Args:
        tokens: (T,) ids, at most `context_size` of them.
        patterns: names, in which `*` stands for any characters, `?` for one and `[01]` for one of these.

    Raises:
        LumiereError: no name matches one of them.
    """
    names = matching_names(model, patterns)
    parts = [name for name in hook_points(model) if name.endswith(("embed", "hook_attn_out", "hook_mlp_out"))]
    tokens_1T = one_sequence(model, tokens)
    with torch.inference_mode():
        output, cache = run_with_cache(model, tokens_1T, {*names, *parts})
        logits = model.logits(tokens_1T)
        stream = output.hidden_states[:, -1]
        total = torch.stack([cache[name] for name in parts]).sum(0)
    values = {name: activation[0].cpu().numpy() for name, activation in cache.items() if name in set(names)}
    return Activations(
        tokens=tuple(tokens),
        names=tuple(values),
        axes=tuple(AXES.get(name.rpartition(".")[2], "T E") for name in values),
        shapes=tuple(value.shape for value in values.values()),
        num_bytes=tuple(value.nbytes for value in values.values()),
        values=values,
        receipts=(
            Receipt("the parts add up to the residual stream", relative_error(total, stream, TINY), rounding(model)),
            Receipt(
                "watched or not, the logits are the same", relative_error(output.logits, logits, TINY), rounding(model)
            ),
        ),
    )
