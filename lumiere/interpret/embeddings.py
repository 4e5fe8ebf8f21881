"""Where the tokens lie: the token embedding, seen in the two directions in which it varies most.

Shapes: N chosen token, K neighbour, E embedding_size, Vocab vocab_size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, Result
from lumiere.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class TokenMap(Result):
    """A flat map of tokens.

    Attributes:
        tokens: (N,) the ids on the map.
        points: (N, 2) their places: scores on the first two principal components.
        variances: (2,) the share of the variance that each direction explains.
        neighbours: (N, K) the tokens on the map with the largest cosine, the nearest first.
        cosines: (N, K), of the embeddings less the mean embedding.
    """

    tokens: tuple[int, ...]
    points: np.ndarray
    variances: np.ndarray
    neighbours: np.ndarray
    cosines: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for token, (x, y), neighbour, cosine in zip(
            self.tokens, self.points, self.neighbours, self.cosines, strict=True
        ):
            nearest = {"neighbour": int(neighbour[0]), "cosine": float(cosine[0])} if len(neighbour) else {}
            yield {"token": token, "x": float(x), "y": float(y), **nearest}


def token_map(model: Transformer, tokens: Sequence[int], num_neighbours: int = 5) -> TokenMap:
    """Principal components of the embeddings of `tokens` (Pearson 1901; Hotelling 1933), and nearest neighbours.

    A flat map of E dimensions hides most of them: what is near on it need not be near. The neighbours are computed in
    all dimensions, by the cosine of embeddings less their mean, since one shared direction makes all cosines large
    (Mu and Viswanath 2018, "All-but-the-Top"). The sign of a component means nothing; here the largest absolute
    coordinate is positive, so that a map comes out the same every time.

    Args:
        model: any.
        tokens: at least one id, each once. The coordinates along missing components are 0.
        num_neighbours: of each token, fewer where there are fewer.
    """
    table_NE = model.token_embedding.weight.detach().cpu().double().numpy()[list(tokens)]
    centred_NE = table_NE - table_NE.mean(0)
    left, sizes, directions = np.linalg.svd(centred_NE, full_matrices=False)
    # One token, or a width of one, has a single component.
    lacking = max(0, 2 - len(sizes))
    left, sizes = np.pad(left, ((0, 0), (0, lacking))), np.pad(sizes, (0, lacking))
    directions = np.pad(directions, ((0, lacking), (0, 0)))
    points_N2 = left[:, :2] * sizes[:2]
    points_N2 *= np.sign(points_N2[np.abs(points_N2).argmax(0), [0, 1]])
    total = max(np.square(centred_NE).sum(), np.finfo(float).tiny)
    unit_NE = centred_NE / np.maximum(np.linalg.norm(centred_NE, axis=1, keepdims=True), np.finfo(float).tiny)
    cosine_NN = unit_NE @ unit_NE.T
    np.fill_diagonal(cosine_NN, -np.inf)
    order = np.argsort(-cosine_NN, axis=1, kind="stable")[:, : min(num_neighbours, len(tokens) - 1)]
    projected_N2 = centred_NE @ directions[:2].T
    missed = np.abs(np.abs(projected_N2) - np.abs(points_N2)).max() / max(1.0, float(np.abs(points_N2).max()))
    return TokenMap(
        tokens=tuple(tokens),
        points=points_N2,
        variances=np.square(sizes[:2]) / total,
        neighbours=np.array(tokens)[order],
        cosines=np.take_along_axis(cosine_NN, order, axis=1),
        receipts=(
            Receipt("the map is a projection of the embeddings", float(missed), FLOAT64_TOLERANCE),
            Receipt(
                "the directions hold all variance",
                abs(float((np.square(sizes).sum() - np.square(centred_NE).sum()) / total)),
                1e-10,
            ),
        ),
    )
