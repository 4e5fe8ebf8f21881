"""What the weights alone say: parameters by part, norms and ranks of the matrices, rows that are the same.

Shapes: M matrix, V rows of a table, E its columns.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lumiere.components.short_repr import ShortRepr
from lumiere.models.transformer import Transformer

PARTS: tuple[str, ...] = ("token_embedding", "positions", "attention", "feedforward", "norms")
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class MatrixFacts(ShortRepr):
    """The sizes of a model's matrices, all (M,), computed in float64; NaN for a matrix that is not finite.

    Attributes:
        matrices: their names in the state dict.
        shapes: (M, 2).
        norms: Frobenius.
        rms: root mean square of the entries.
        spectral_norms: the largest singular values.
        stable_ranks: Frobenius norm squared over spectral norm squared.
        effective_ranks: the exponential of the entropy of the singular values over their sum (Roy & Vetterli 2007,
            "The Effective Rank"). Both ranks are 0 for a matrix of zeros.
    """

    matrices: tuple[str, ...]
    shapes: np.ndarray
    norms: np.ndarray
    rms: np.ndarray
    spectral_norms: np.ndarray
    stable_ranks: np.ndarray
    effective_ranks: np.ndarray


def count_parts(model: Transformer) -> dict[str, int]:
    """Trainable numbers by part, as `PARTS` names them; the tied output head counts once."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def part_of(name: str) -> str:
    """The part that a parameter of that name belongs to."""
    *path, module, _ = name.split(".")
    if module.endswith("norm"):
        return "norms"
    if module == "position_embedding":
        return "positions"
    return path[-1] if path else module


def matrices(model: Transformer) -> Mapping[str, np.ndarray]:
    """The matrices by name, in float64."""
    return {name: value.cpu().double().numpy() for name, value in model.state_dict().items() if value.ndim == 2}


def matrix_facts(model: Transformer) -> MatrixFacts:
    """Norms and ranks of every matrix, from its singular values."""
    found = matrices(model)
    facts = np.array([spectrum_facts(matrix) for matrix in found.values()])
    shapes = np.array([matrix.shape for matrix in found.values()])
    return MatrixFacts(tuple(found), shapes, *facts.T)


def spectrum_facts(matrix: np.ndarray) -> tuple[float, float, float, float, float]:
    """Frobenius norm, root mean square, spectral norm, stable rank, effective rank."""
    if not np.isfinite(matrix).all():
        return np.nan, np.nan, np.nan, np.nan, np.nan
    values = np.linalg.svd(matrix, compute_uv=False)
    largest = float(values.max())
    norm = float(np.sqrt(np.square(matrix).sum()))
    rms = norm / np.sqrt(matrix.size)
    if largest == 0:
        return norm, rms, 0.0, 0.0, 0.0
    shares = values / values.sum()
    entropy = -sum(share * np.log(share) for share in shares if share > 0)
    return norm, rms, largest, float(np.square(values / largest).sum()), float(np.exp(entropy))


def same_rows(table_VE: Tensor, cosine: float) -> Iterator[tuple[int, int]]:
    """The rows that point the same way as an earlier one, each with the first such; rows of zeros point nowhere.

    Args:
        cosine: of the angle between the two, from which on they are the same.
    """
    directions_VE = torch.nn.functional.normalize(table_VE.detach().float(), dim=-1)
    for first in range(0, len(directions_VE), ROWS_AT_ONCE):
        rows = directions_VE[first : first + ROWS_AT_ONCE]
        near = (rows @ directions_VE[: first + len(rows)].T >= cosine).tril(diagonal=first - 1)
        found = near.any(dim=1).nonzero()[:, 0]
        # Of equal values, the first is the largest's place.
        earliest = near[found].int().argmax(dim=1)
        yield from zip((found + first).tolist(), earliest.tolist(), strict=True)
