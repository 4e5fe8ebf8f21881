"""The parts of a model that can be taken away: where the activation of each is read, and what it writes.

Shapes: B batch, T position, E embedding_size, H head, V d_value, F d_ff, U units of one layer, W width of a
unit's activation, N chosen units.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lumiere.errors import LumiereError, nearest
from lumiere.models.transformer import Transformer

Stage = Literal["pre", "mid", "post"]
"""Where in a block a change of the residual stream enters it: `hook_resid_pre`, `_mid` or `_post`."""

Cache = Mapping[str, Tensor]


Write = Callable[[Transformer, int, Tensor, Sequence[int]], Tensor]
"""(model, layer, new activations less old ones (B, T, U, W), chosen units) -> (N, B, T, E): what a change of each of
these units, and of no other, adds to the stream."""


@dataclass(frozen=True)
class Unit:
    """A kind of part.

    Attributes:
        label: how unit `index` of a layer is called.
        count: (model, T) -> U.
        hooks: the activations that `read` needs, without `blocks.<layer>.`, the one that is replaced first.
        read: (activations by such a name) -> (B, T, U, W), which of it is replaced.
        place: where unit `index` is in the first of `hooks`.
        write: what follows from a replacement.
        stage: where in the block that enters the stream.
    """

    label: str
    count: Callable[[Transformer, int], int]
    hooks: tuple[str, ...]
    read: Callable[[Cache], Tensor]
    place: Callable[[int], tuple[Any, ...]]
    write: Write
    stage: Stage


def write_head(model: Transformer, layer: int, difference_BTHV: Tensor, heads: Sequence[int]) -> Tensor:
    """Each head has its own rows of the output projection."""
    weight_HVE = model.blocks[layer].attention.output.weight.T.unflatten(0, (model.num_heads, model.d_value))
    return torch.einsum("btnv,nve->nbte", difference_BTHV[:, :, list(heads)], weight_HVE[list(heads)])


def write_neuron(model: Transformer, layer: int, difference_BTF1: Tensor, neurons: Sequence[int]) -> Tensor:
    """Each neuron has its own row of the second feed-forward matrix."""
    weight_NE = model.blocks[layer].feedforward.down.weight.T[list(neurons)]
    return torch.einsum("btn,ne->nbte", difference_BTF1[:, :, list(neurons), 0], weight_NE)


def write_stream(model: Transformer, layer: int, difference_BT1E: Tensor, indices: Sequence[int]) -> Tensor:
    """What is read where it enters the stream is written as it is."""
    return difference_BT1E.permute(2, 0, 1, 3)[list(indices)]


def write_position(model: Transformer, layer: int, difference_BT1E: Tensor, positions: Sequence[int]) -> Tensor:
    """The stream changes at one position and at no other."""
    written_NBTE = difference_BT1E.new_zeros(len(positions), *difference_BT1E[:, :, 0].shape)
    for row, position in enumerate(positions):
        written_NBTE[row, :, position] = difference_BT1E[:, position, 0]
    return written_NBTE


UNITS: Mapping[str, Unit] = {
    "head": Unit(
        label="L{layer}H{index}",
        count=lambda model, num_positions: model.num_heads,
        hooks=("attn.hook_z",),
        read=lambda cache: cache["attn.hook_z"],
        place=lambda index: (..., index, slice(None)),
        write=write_head,
        stage="mid",
    ),
    "feedforward": Unit(
        label="L{layer} feed-forward",
        count=lambda model, num_positions: 1,
        hooks=("hook_mlp_out",),
        read=lambda cache: cache["hook_mlp_out"].unsqueeze(2),
        place=lambda index: (...,),
        write=write_stream,
        stage="post",
    ),
    "layer": Unit(
        label="L{layer}",
        count=lambda model, num_positions: 1,
        hooks=("hook_resid_post", "hook_resid_pre"),
        read=lambda cache: (cache["hook_resid_post"] - cache["hook_resid_pre"]).unsqueeze(2),
        place=lambda index: (...,),
        write=write_stream,
        stage="post",
    ),
    "neuron": Unit(
        label="L{layer}N{index}",
        count=lambda model, num_positions: model.d_ff,
        hooks=("mlp.hook_post",),
        read=lambda cache: cache["mlp.hook_post"].unsqueeze(-1),
        place=lambda index: (..., index),
        write=write_neuron,
        stage="post",
    ),
    "position": Unit(
        label="L{layer}P{index}",
        count=lambda model, num_positions: num_positions,
        hooks=("hook_resid_pre",),
        read=lambda cache: cache["hook_resid_pre"].unsqueeze(2),
        place=lambda index: (slice(None), index),
        write=write_position,
        stage="pre",
    ),
}


def find_unit(name: str) -> Unit:
    """The unit of that name.

    Raises:
        LumiereError: there is none.
    """
    if name not in UNITS:
        guess = nearest(name, UNITS)
        raise LumiereError(f"there is no unit {name!r}", f"did you mean {guess}?" if guess else ", ".join(UNITS))
    return UNITS[name]


def stream_after(model: Transformer, layer: int, stage: Stage, resid_BTE: Tensor) -> Tensor:
    """The normalised final residual stream, given the stream at a stage of a block.

    Args:
        model: in evaluation mode.
        resid_BTE: (B, T, E).
    """
    if stage == "pre":
        return model.continue_from(resid_BTE, layer)
    if stage == "mid":
        block = model.blocks[layer]
        resid_BTE = resid_BTE + block.feedforward(block.feedforward_norm(resid_BTE))
    return model.continue_from(resid_BTE, layer + 1)
