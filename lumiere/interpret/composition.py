"""How much a head reads of what an earlier head writes: Q-, K- and V-composition, from the weights alone.

Shapes: L layer, H head, E embedding_size, K d_key, V d_value, P pair of heads, C kind of composition.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, Result
from lumiere.models.transformer import Transformer

KINDS = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Composition(Result):
    """The scores of all pairs of a head and one in a later layer.

    Attributes:
        kinds: (C,) `KINDS`.
        pairs: (P, 4) layer and head of the earlier one, layer and head of the later one.
        scores: (P, C) from 0 to 1; NaN where one of the heads writes or looks for nothing.
        chance: what two matrices without any relation score.
    """

    kinds: tuple[str, ...]
    pairs: np.ndarray
    scores: np.ndarray
    chance: float

    def rows(self) -> Iterator[Mapping[str, Any]]:
        columns = ("layer", "head", "later_layer", "later_head")
        for pair, scores in zip(self.pairs.tolist(), self.scores.tolist(), strict=True):
            for kind, score in zip(self.kinds, scores, strict=True):
                yield {**dict(zip(columns, pair, strict=True)), "kind": kind, "score": score, "chance": self.chance}


def composition_scores(model: Transformer) -> Composition:
    """`|W_OV W| / (|W_OV| |W|)`, Frobenius norms, for each head and each head of a later layer.

    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". W_OV is what the earlier head reads and
    writes; W is, of the later one, W_QK for Q-composition, its transpose for K-composition, W_OV for V-composition, all
    (E, E), for row vectors, with the norms' gains in the matrices that read. For matrices that are turned against each
    other at random, the mean square of the score is 1 / E: `chance` is its root. Other baselines are the scores of
    random matrices of the same shapes (Elhage et al., who subtract it; the same number, measured) and the mean over
    other pairs of heads, which takes out what all heads share.

    With rotary positions W_QK is that of a distance of 0.

    No (E, E) matrix is made but for the receipt: with W = a b, the squared norm of a product is a trace of products of
    (V, V) and (K, K) matrices, in float64.
    """
    reads, writes, queries, keys = head_matrices(model)
    tall = {"q": queries, "k": keys, "v": reads}
    wide = {"q": keys.swapaxes(-1, -2), "k": queries.swapaxes(-1, -2), "v": writes}
    own_reads, own_writes = gram(reads.swapaxes(-1, -2)), gram(writes)
    ov_norms = np.sqrt(np.einsum("lhvw,lhvw->lh", own_reads, own_writes))
    pairs, columns, errors = pair_list(model.num_layers, model.num_heads), [], [0.0]
    first, second = tuple(pairs[:, :2].T), tuple(pairs[:, 2:].T)
    for kind in KINDS:
        later_norms = np.sqrt(np.einsum("lhkj,lhkj->lh", gram(tall[kind].swapaxes(-1, -2)), gram(wide[kind])))
        joined = writes[first] @ tall[kind][second]
        squares = np.einsum(
            "pvw,pvk,pkj,pwj->p", own_reads[first], joined, gram(wide[kind])[second], joined, optimize=True
        )
        sizes = ov_norms[first] * later_norms[second]
        with np.errstate(invalid="ignore", divide="ignore"):
            scores = np.where(sizes > 0, np.sqrt(np.maximum(squares, 0)) / sizes, np.nan)
        columns.append(scores)
        if np.isfinite(scores).any():
            best = int(np.nanargmax(scores))
            earlier, later = (tuple(place) for place in (pairs[best, :2], pairs[best, 2:]))
            dense_ov, dense = reads[earlier] @ writes[earlier], tall[kind][later] @ wide[kind][later]
            expected = np.linalg.norm(dense_ov @ dense) / (np.linalg.norm(dense_ov) * np.linalg.norm(dense))
            errors.append(float(abs(scores[best] - expected)))
    scores_PC = np.stack(columns, axis=1)
    beyond = float(np.nanmax(np.abs(scores_PC - 0.5), initial=0.5)) - 0.5
    return Composition(
        kinds=KINDS,
        pairs=pairs,
        scores=scores_PC,
        chance=model.embedding_size**-0.5,
        receipts=(
            Receipt("the strongest compositions are those of the whole matrices", max(errors), FLOAT64_TOLERANCE),
            Receipt("compositions lie between 0 and 1", beyond, FLOAT64_TOLERANCE),
        ),
    )


def head_matrices(model: Transformer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """W_V (L, H, E, V), W_O (L, H, V, E), W_Q and W_K (L, H, E, K), gains in those that read, in float64."""
    found: tuple[list[np.ndarray], ...] = ([], [], [], [])
    for block in model.blocks:
        attention, gain = block.attention, block.attention_norm.weight.detach().cpu().double().numpy()
        for matrices, part in zip(found, ("value", "output", "query", "key"), strict=True):
            weight = getattr(attention, part).weight.detach().cpu().double().numpy()
            if part == "output":
                matrices.append(weight.T.reshape(model.num_heads, -1, model.embedding_size))
            else:
                heads = (weight * gain).reshape(model.num_heads, -1, model.embedding_size)
                matrices.append(heads.swapaxes(-1, -2))
    reads, writes, queries, keys = (np.stack(matrices) for matrices in found)
    return reads, writes, queries, keys


def gram(matrices: np.ndarray) -> np.ndarray:
    """Of each matrix m the product m m^T."""
    return matrices @ matrices.swapaxes(-1, -2)


def pair_list(num_layers: int, num_heads: int) -> np.ndarray:
    """(P, 4) layer and head of the earlier one and of the later one, in order; none for a single layer."""
    pairs = [
        (*earlier, *later)
        for earlier in np.ndindex(num_layers, num_heads)
        for later in np.ndindex(num_layers, num_heads)
        if later[0] > earlier[0]
    ]
    return np.array(pairs, dtype=int).reshape(-1, 4)
