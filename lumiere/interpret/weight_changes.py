"""Which weights differ between two models, and by how much."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lumiere.components.short_repr import ShortRepr
from lumiere.interpret.composition import head_matrices
from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class WeightChanges(ShortRepr):
    """The tensors that both models have in the same shape, (M,) each, computed in float64.

    Attributes:
        tensors: their names in the state dict.
        change_norms: Frobenius norm of the difference.
        relative_changes: the same over the norm of A's; NaN where that is 0 and B's is not.
        spectral_changes: the largest singular value of the difference: how much it can change an input of length 1;
            of a vector, its length.
        other_tensors: those that only one has, or both in different shapes.
    """

    tensors: tuple[str, ...]
    change_norms: np.ndarray
    relative_changes: np.ndarray
    spectral_changes: np.ndarray
    other_tensors: tuple[str, ...]


def weight_changes(first: Transformer, second: Transformer, left_out: Sequence[str] = ()) -> WeightChanges:
    """`|W_B - W_A|_F`, that over `|W_A|_F`, and `|W_B - W_A|_2` of each tensor.

    The two norms differ where a change has low rank: a change along one direction has both alike, one that is spread
    over all n directions has a spectral norm smaller by the root of n.

    Args:
        left_out: tensors not to compare, which are named among the other ones.
    """
    sides = [
        {name: weight.detach().cpu().double().numpy() for name, weight in model.state_dict().items()}
        for model in (first, second)
    ]
    a, b = sides
    shared = [name for name in a if name in b and a[name].shape == b[name].shape and name not in left_out]
    differences = [b[name] - a[name] for name in shared]
    norms = np.array([np.linalg.norm(difference) for difference in differences])
    return WeightChanges(
        tensors=tuple(shared),
        change_norms=norms,
        relative_changes=np.array([relative(norm, a[name]) for norm, name in zip(norms, shared, strict=True)]),
        # A matrix has a spectral norm; the largest singular value of a vector is its length.
        spectral_changes=np.array([np.linalg.norm(difference, 2) for difference in differences]),
        other_tensors=tuple(name for name in dict.fromkeys([*a, *b]) if name not in shared),
    )


def relative(change: float, weight: np.ndarray) -> float:
    if change == 0:
        return 0.0
    size = np.linalg.norm(weight)
    return float(change / size) if size > 0 else float("nan")


def circuit_changes(first: Transformer, second: Transformer, matches: np.ndarray) -> dict[str, np.ndarray]:
    """`ov_changes` and `qk_changes`, (M,) each: relative Frobenius changes of the circuits of matched heads; NaN where
    the widths of the residual streams differ.

    `|C_B - C_A| / |C_A|` with C = W_V W_O or W_Q W_K^T, (E, E) for row vectors, with the norms' gains in the matrices
    that read (Elhage et al. 2021). Unlike the weights themselves, they stay as they are when a head's own
    coordinates are turned. They are in the coordinates of the residual stream, so that the comparison means something
    only for two models with a common past.

    Args:
        matches: (M, 2) heads of the one and of the other, counted through all layers.
    """
    names = ("ov_changes", "qk_changes")
    if first.embedding_size != second.embedding_size:
        return {name: np.full(len(matches), np.nan) for name in names}
    sides = [[part.reshape(-1, *part.shape[2:]) for part in head_matrices(model)] for model in (first, second)]

    def circuits(side: int, head: int) -> list[np.ndarray]:
        reads, writes, queries, keys = (part[head] for part in sides[side])
        return [reads @ writes, queries @ keys.T]

    found = np.empty((len(matches), 2))
    for row, (a, b) in enumerate(matches):
        for column, (old, new) in enumerate(zip(circuits(0, a), circuits(1, b), strict=True)):
            found[row, column] = relative(float(np.linalg.norm(new - old)), old)
    return dict(zip(names, found.T, strict=True))
