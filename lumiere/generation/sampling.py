"""From the logits of the next token to the next token.

Names, meaning and order of effect are those of `transformers`: first what changes logits (repetition penalty, n-grams;
`Repetition`), then temperature, top-k, top-p, min-p, typical-p.

Shapes: B rows, V vocabulary, N candidates of a row, M of all rows, G groups of ids.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import exp

import numpy as np
import torch
from torch import Tensor

from lumiere.errors import LumiereError

CHUNKS = 16  # that the vocabulary is cut into while looking for its largest logits
BELOW_ONE = 1 - 2**-40  # so that rounding never takes a draw past the last token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None leaves a control out.

    Attributes:
        temperature: divides the logits; 0 is greedy: it always takes the likeliest token, and what follows is left out.
        top_k: keep the k likeliest tokens. Fan et al. 2018.
        top_p: keep the fewest tokens whose probabilities sum to at least p. Holtzman et al. 2020.
        min_p: keep tokens with at least this share of the likeliest one's probability. Nguyen et al. 2024.
        typical_p: keep the tokens whose information is nearest to the expected one, until their probabilities sum to
            at least p. Meister et al. 2023.
        repetition_penalty: makes tokens that the text has, prompt included, less likely: divides positive logits and
            multiplies negative ones. Keskar et al. 2019.
        no_repeat_ngram_size: no n tokens in a row come twice, prompt included.

    Raises:
        LumiereError: if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise LumiereError(f"the temperature must be 0 or more, not {self.temperature}", "0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise LumiereError(f"top-k must be at least 1, not {self.top_k}", "leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise LumiereError(f"top-p must be more than 0 and at most 1, not {self.top_p}", "0.95 is common")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise LumiereError(f"min-p must be from 0 to 1, not {self.min_p}", "0.05 is common")
        if self.typical_p is not None and not 0 < self.typical_p < 1:
            raise LumiereError(f"typical-p must be more than 0 and less than 1, not {self.typical_p}", "0.9 is common")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            raise LumiereError(
                f"the repetition penalty must be more than 0, not {self.repetition_penalty}", "1 is none, 1.2 is common"
            )
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 1:
            raise LumiereError(
                f"the size of n-grams that may not repeat must be at least 1, not {self.no_repeat_ngram_size}",
                "3 is common; leave it out to let them repeat",
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distributions that the next tokens are drawn from, of the shape of the logits, (..., V)."""
    if sampling.is_greedy:
        return torch.zeros_like(logits_BV).scatter(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        # Near temperature 0 a quotient may overflow. Less the largest logit and in float64 it can do so only to minus
        # infinity, which softmax takes; plus infinity would give NaN. On the CPU: not every device has float64.
        shifted_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).cpu().double()
        logits_BV = (shifted_BV / sampling.temperature).to(logits_BV.dtype).to(logits_BV.device)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        smallest_kept_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept_B1, -torch.inf)
    if sampling.top_p is not None:
        logits_BV = _top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        shares_BV = logits_BV.softmax(-1)
        goes_BV = shares_BV < sampling.min_p * shares_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(goes_BV, -torch.inf)
    if sampling.typical_p is not None:
        logits_BV = _typical_p(logits_BV, sampling.typical_p)
    return logits_BV.softmax(-1)


def draw(logits_BV: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> list[int]:
    """The next token of each row.

    A row's token is a function of its logits and its number alone, whatever the other rows are.

    Args:
        uniforms: a number from 0 to 1, without 1, for each row; greedy does not look at them.
    """
    if sampling.is_greedy:
        return logits_BV.argmax(-1).tolist()
    top_k = sampling.top_k
    if top_k is None or top_k >= logits_BV.shape[-1] or sampling.typical_p is not None:
        return _inverse(probabilities(logits_BV, sampling), uniforms).squeeze(1).tolist()
    # All that comes after top-k looks at what top-k has left, so it can work on about k numbers instead of V. For one
    # stream these are less work for Python than twenty operations would be to call; for more, numpy takes a fraction of
    # the time that torch needs to find them.
    if len(uniforms) == 1:
        values, ids = (x.tolist() for x in logits_BV[0].topk(top_k + 1))
        if values[top_k - 1] > values[top_k]:  # or else tokens that are tied with the k-th stay too
            return [ids[_place(values[:top_k], sampling, uniforms[0])]]
    values_BN, ids_BN = largest(logits_BV.float().numpy(force=True), top_k)
    places_B = _places(values_BN, top_k, sampling, np.array(uniforms))
    return ids_BN[np.arange(len(places_B)), places_B].tolist()


def _place(values: Sequence[float], sampling: Sampling, uniform: float) -> int:
    """`_places` of one row, which has no more than what top-k keeps."""
    weights = [exp((value - values[0]) / sampling.temperature) for value in values]
    if sampling.top_p is not None:
        rest = total = sum(weights)
        for kept, weight in enumerate(weights):
            if kept and rest <= (1 - sampling.top_p) * total:
                del weights[kept:]
                break
            rest -= weight
    if sampling.min_p is not None:
        weights = [weight for weight in weights if weight >= sampling.min_p]
    number = uniform * BELOW_ONE * sum(weights)
    for place, weight in enumerate(weights):
        number -= weight
        if number < 0:
            return place
    return 0  # rounding has used up the last bit of the sum: the likeliest is never wrong


def _places(values_BN: np.ndarray, top_k: int, sampling: Sampling, uniforms_B: np.ndarray) -> np.ndarray:
    """Which of these logits in falling order are drawn, (B,): `probabilities` and `_inverse` for a few numbers.

    Sums run from left to right, and what a row does not have weighs nothing: so no row depends on its neighbours.
    """
    weights_BN = np.exp((values_BN - values_BN[:, :1]) / sampling.temperature)
    # Tokens that are tied with the k-th stay too.
    weights_BN[values_BN < values_BN[:, top_k - 1, None]] = 0
    sums_BN = weights_BN.cumsum(1)
    if sampling.top_p is not None:
        total_B1 = sums_BN[:, -1:]
        goes_BN = total_B1 - sums_BN + weights_BN <= (1 - sampling.top_p) * total_B1
        goes_BN[:, 0] = False
        weights_BN[goes_BN] = 0
    if sampling.min_p is not None:
        weights_BN[weights_BN < sampling.min_p] = 0
    if sampling.top_p is not None or sampling.min_p is not None:
        sums_BN = weights_BN.cumsum(1)
    numbers_B1 = uniforms_B[:, None] * BELOW_ONE * sums_BN[:, -1:]
    return (sums_BN <= numbers_B1).sum(1)


def largest(logits_BV: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest logits of each row and all that are tied with them, in falling order, and their ids.

    The k-th largest of some groups' maxima is a bound that k logits at least reach, and few others: finding it takes
    a look at each logit, where finding the largest would take many.

    Returns:
        (B, N) twice, float64 and int64. N is at least `count`; what else a row has is smaller than the `count`-th: a
        few more logits, then minus infinity.
    """
    num_rows, vocab_size = logits_BV.shape
    num_groups = vocab_size // CHUNKS
    maxima_BG = logits_BV
    if vocab_size % CHUNKS == 0 and num_groups >= 2 * count:
        maxima_BG = logits_BV.reshape(num_rows, CHUNKS, num_groups).max(1)
    bounds_B1 = np.partition(maxima_BG, -count, axis=1)[:, -count, None]
    found_M = np.flatnonzero(logits_BV >= bounds_B1)
    rows_M, ids_M = np.divmod(found_M, vocab_size)
    counts_B = np.bincount(rows_M, minlength=num_rows)
    columns_M = np.arange(len(found_M)) - (counts_B.cumsum() - counts_B)[rows_M]
    values_BN = np.full((num_rows, counts_B.max()), -np.inf)
    values_BN[rows_M, columns_M] = logits_BV.ravel()[found_M]
    ids_BN = np.zeros(values_BN.shape, dtype=np.int64)
    ids_BN[rows_M, columns_M] = ids_M
    order_BN = values_BN.argsort(axis=1, kind="stable")[:, ::-1]  # ties as in `_top_p`: it keeps the last of them
    return np.take_along_axis(values_BN, order_BN, 1), np.take_along_axis(ids_BN, order_BN, 1)


def _inverse(shares_BN: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Where each row's running sum of probabilities passes its number, (B, 1), on the CPU."""
    sums_BN = shares_BN.cpu().cumsum(-1, dtype=torch.float64)
    numbers_B1 = torch.tensor([[uniform * BELOW_ONE] for uniform in uniforms], dtype=torch.float64)
    return torch.searchsorted(sums_BN, numbers_B1 * sums_BN[:, -1:], right=True)


def _top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    ascending_BV, order_BV = logits_BV.sort(dim=-1, stable=True)
    # A token goes if those up to it, from the unlikeliest on, hold no more than 1 - p; the likeliest stays.
    goes_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - top_p
    goes_BV[..., -1] = False
    return logits_BV.masked_fill(goes_BV.scatter(-1, order_BV, goes_BV), -torch.inf)


def _typical_p(logits_BV: Tensor, typical_p: float) -> Tensor:
    log_shares_BV = logits_BV.log_softmax(-1)
    shares_BV = log_shares_BV.exp()
    entropy_B1 = -(log_shares_BV * shares_BV).nansum(-1, keepdim=True)
    distance_BV = (-log_shares_BV - entropy_B1).abs()
    ascending_BV, order_BV = distance_BV.sort(dim=-1)
    num_before_B1 = (shares_BV.gather(-1, order_BV).cumsum(-1) < typical_p).sum(-1, keepdim=True)
    furthest_B1 = ascending_BV.gather(-1, num_before_B1.clamp_(max=logits_BV.shape[-1] - 1))
    # The nearest stays, even where its distance is no number.
    goes_BV = (ascending_BV > furthest_B1).index_fill(-1, torch.zeros(1, dtype=torch.int64, device=logits_BV.device), 0)
    return logits_BV.masked_fill(goes_BV.scatter(-1, order_BV, goes_BV), -torch.inf)


class Repetition:
    """The repetition penalty and the ban on n-grams that come again, for rows of text that grow.

    A step costs the same however long the texts are.

    Args:
        rows: the texts so far.
        sampling: its `repetition_penalty` and `no_repeat_ngram_size`.
        vocab_size: of the logits.
        device: where the logits are.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], sampling: Sampling, vocab_size: int, device: torch.device
    ) -> None:
        self._penalty = sampling.repetition_penalty or 1.0
        self._size = sampling.no_repeat_ngram_size
        self._is_seen_BV = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
        self._ngrams = [_Ngrams(self._size) for _ in rows] if self._size is not None else []
        for i, row in enumerate(rows):
            self._is_seen_BV[i, list(row)] = True
            for ngrams in self._ngrams[i : i + 1]:
                ngrams.extend(row)

    def applied(self, logits_BV: Tensor) -> Tensor:
        """The logits after penalty and bans."""
        if self._penalty != 1:
            weakened_BV = torch.where(logits_BV < 0, logits_BV * self._penalty, logits_BV / self._penalty)
            logits_BV = torch.where(self._is_seen_BV, weakened_BV, logits_BV)
        banned = [(i, token) for i, ngrams in enumerate(self._ngrams) for token in ngrams.banned()]
        if banned:
            rows, tokens = zip(*banned, strict=True)
            logits_BV = logits_BV.clone()
            logits_BV[list(rows), list(tokens)] = -torch.inf
        return logits_BV

    def append(self, tokens: Sequence[int]) -> None:
        """One more token of each row."""
        self._is_seen_BV[range(len(tokens)), list(tokens)] = True
        for ngrams, token in zip(self._ngrams, tokens, strict=bool(self._ngrams)):
            ngrams.extend([token])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may be named more than once."""
        self._is_seen_BV = self._is_seen_BV[list(rows)]
        if self._ngrams:
            self._ngrams = [deepcopy(self._ngrams[row]) for row in rows]


class _Ngrams:
    """The n-grams of a text, by their first n - 1 tokens."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._last: tuple[int, ...] = ()
        self._followers: dict[tuple[int, ...], set[int]] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if len(self._last) == self._size - 1:
                self._followers.setdefault(self._last, set()).add(token)
            self._last = (*self._last, token)[max(0, len(self._last) + 2 - self._size) :]

    def banned(self) -> set[int]:
        """The tokens that would complete an n-gram that the text has."""
        return self._followers.get(self._last, set()) if len(self._last) == self._size - 1 else set()
