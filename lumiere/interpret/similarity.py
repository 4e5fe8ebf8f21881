"""How alike two models' insides are on the same tokens: representations by CKA, attention by its divergence.

Shapes: N tokens, A and B layers of the one and the other model, E and F their widths, T position (destination), S
position (source), H and G heads of the one and the other.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class LinearCka:
    """Linear CKA of all pairs of layers, from tokens that come in parts.

    `|Y^T X|^2 / (|X^T X| |Y^T Y|)`, Frobenius norms, X (N, E) and Y (N, F) with the mean of each column taken away
    (Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", equation 5 with a linear kernel).
    1 for equal representations and for such that are rotated, mirrored or scaled as a whole; other linear maps change
    it. This is the biased estimate of that paper: two unrelated representations have about (E + F) / N where N is not
    much larger than the widths, so give it many tokens. The debiased one (Székely & Rizzo 2014; for CKA, Nguyen et al.
    2021) needs the dot products of all pairs of tokens to be corrected for their own, and is the choice for few tokens.

    Sums are in float64. Columns are measured from the means of the first part, so that a large mean costs no digits.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.shifts: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.products: dict[tuple[str, int, int], Tensor] = {}

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Takes in the same N tokens of both models: A times (N, E), B times (N, F)."""
        sides = [[x.cpu().double() for x in side] for side in (first, second)]
        if not self.num_tokens:
            self.shifts = ([x.mean(0) for x in sides[0]], [x.mean(0) for x in sides[1]])
            self.sums = ([torch.zeros_like(x[0]) for x in sides[0]], [torch.zeros_like(x[0]) for x in sides[1]])
        xs, ys = ([x - shift for x, shift in zip(*pair, strict=True)] for pair in zip(sides, self.shifts, strict=True))
        for sums, side in zip(self.sums, (xs, ys), strict=True):
            for total, x in zip(sums, side, strict=True):
                total += x.sum(0)
        # One product a pair, all of the same kind: equal representations then give equal sums to the last bit.
        for a, x in enumerate(xs):
            self._add_product("aa", a, a, x.T @ x)
            for b, y in enumerate(ys):
                self._add_product("ab", a, b, x.T @ y)
        for b, y in enumerate(ys):
            self._add_product("bb", b, b, y.T @ y)
        self.num_tokens += len(xs[0])

    def _add_product(self, kind: str, row: int, column: int, product: Tensor) -> None:
        key = (kind, row, column)
        self.products[key] = self.products[key] + product if key in self.products else product

    def similarities(self) -> np.ndarray:
        """(A, B); NaN where a representation is the same for all tokens."""
        found = np.empty((len(self.sums[0]), len(self.sums[1])))
        for a, b in np.ndindex(*found.shape):
            own = self._alignment("aa", a, a) * self._alignment("bb", b, b)
            found[a, b] = self._alignment("ab", a, b) / np.sqrt(own) if own > 0 else np.nan
        return found

    def _alignment(self, kind: str, row: int, column: int) -> float:
        """The squared Frobenius norm of the centred product."""
        left, right = (self.sums["ab".index(side)][index] for side, index in zip(kind, (row, column), strict=True))
        centred = self.products[kind, row, column] - torch.outer(left, right) / self.num_tokens
        return float(centred.square().sum())


def pattern_divergences(first_BHTS: Tensor, second_BGTS: Tensor, is_real_BT: Tensor) -> np.ndarray:
    """(H, G) Jensen-Shannon divergence of two heads' rows in bits, summed over the rows that count.

    `H((p + q) / 2) - (H(p) + H(q)) / 2` with the entropy H (Lin 1991, "Divergence Measures Based on the Shannon
    Entropy", equation 4.1): 0 where both look at the same tokens alike, 1 where no token has weight from both.

    Args:
        first_BHTS, second_BGTS: patterns on the same tokens, rows summing to 1.
        is_real_BT: the rows that count; others may hold anything.
    """
    found = np.empty((first_BHTS.shape[1], second_BGTS.shape[1]))
    # Each head in memory of its own: the same numbers in the same places make the same entropies to the last bit.
    firsts, seconds = (
        [(p_BTS, torch.special.entr(p_BTS)) for p_BTS in (patterns[:, head].contiguous() for head in range(count))]
        for patterns, count in zip((first_BHTS, second_BGTS), found.shape, strict=True)
    )
    for h, (p_BTS, p_entropy) in enumerate(firsts):
        for g, (q_BTS, q_entropy) in enumerate(seconds):
            each_BT = (torch.special.entr((p_BTS + q_BTS) / 2) - (p_entropy + q_entropy) / 2).sum(-1)
            found[h, g] = each_BT.clamp(min=0)[is_real_BT].cpu().sum(dtype=torch.float64).item() / np.log(2)
    return found
