"""Choose the next token from the model's logits.

Names, meaning and order are those of `transformers`: first what changes logits (repetition penalty, n-grams;
`Repetition`), then temperature, top-k, top-p, min-p, typical-p.

Shapes: B rows, V vocabulary, N candidates of a row, M candidates of all rows, G groups of ids.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import exp, inf

import numpy as np
import torch
from torch import Tensor

from lumiere.errors import LumiereError

CHUNKS = 16  # of the vocabulary, in the search for its largest logits
BELOW_ONE = 1 - 2**-40  # so that rounding never takes a draw past the last token


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. None turns a control off.

    Raises:
        LumiereError: A value is out of range.
    """

    temperature: float = 1.0
    """Divides the logits. 0 is greedy: the most probable token, and the controls below have no effect."""
    top_k: int | None = None
    """Keep the k most probable tokens (Fan et al. 2018)."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probabilities sum to p (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Keep tokens with at least this fraction of the top-1 probability (Nguyen et al. 2024)."""
    typical_p: float | None = None
    """Keep the tokens closest to the expected information, until they sum to p (Meister et al. 2023)."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of tokens in the prompt or text (Keskar et al. 2019)."""
    no_repeat_ngram_size: int | None = None
    """Never generate the same n-gram of this size twice, prompt included."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise LumiereError(f"the temperature must be 0 or more, not {self.temperature}", "0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise LumiereError(f"top-k must be at least 1, not {self.top_k}", "leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise LumiereError(f"top-p must be more than 0 and at most 1, not {self.top_p}", "0.95 is common")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise LumiereError(f"min-p must be from 0 to 1, not {self.min_p}", "0.05 is common")
        if self.typical_p is not None and not 0 < self.typical_p < 1:
            raise LumiereError(f"typical-p must be more than 0 and less than 1, not {self.typical_p}", "0.9 is common")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < inf:
            message = f"the repetition penalty must be more than 0, not {self.repetition_penalty}"
            raise LumiereError(message, "1 has no effect, 1.2 is common")
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 1:
            message = f"the size of n-grams that may not repeat must be at least 1, not {self.no_repeat_ngram_size}"
            raise LumiereError(message, "3 is common; leave it out to let them repeat")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the distributions that the next tokens are drawn from, in the shape of the logits, (..., V)."""
    if sampling.is_greedy:
        return torch.zeros_like(logits_BV).scatter(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        # Near temperature 0 a quotient may overflow. Less the largest logit and in float64, it overflows only to minus
        # infinity, which softmax accepts; plus infinity would give NaN. On the CPU: not every device has float64.
        shifted_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).cpu().double()
        logits_BV = (shifted_BV / sampling.temperature).to(logits_BV.dtype).to(logits_BV.device)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        smallest_kept_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept_B1, -inf)
    if sampling.top_p is not None:
        ascending_BV, order_BV = logits_BV.sort(dim=-1, stable=True)
        # Drop a token if those up to it, least probable first, sum to at most 1 - p; keep the most probable.
        is_dropped_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        is_dropped_BV[..., -1] = False
        logits_BV = logits_BV.masked_fill(is_dropped_BV.scatter(-1, order_BV, is_dropped_BV), -inf)
    if sampling.min_p is not None:
        probabilities_BV = logits_BV.softmax(-1)
        is_dropped_BV = probabilities_BV < sampling.min_p * probabilities_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(is_dropped_BV, -inf)
    if sampling.typical_p is not None:
        logits_BV = _typical_p(logits_BV, sampling.typical_p)
    return logits_BV.softmax(-1)


def _typical_p(logits_BV: Tensor, typical_p: float) -> Tensor:
    logprobs_BV = logits_BV.log_softmax(-1)
    probabilities_BV = logprobs_BV.exp()
    entropy_B1 = -(logprobs_BV * probabilities_BV).nansum(-1, keepdim=True)
    ascending_BV, order_BV = (-logprobs_BV - entropy_B1).abs().sort(dim=-1)
    num_before_B1 = (probabilities_BV.gather(-1, order_BV).cumsum(-1) < typical_p).sum(-1, keepdim=True)
    furthest_B1 = ascending_BV.gather(-1, num_before_B1.clamp_(max=logits_BV.shape[-1] - 1))
    is_dropped_BV = ascending_BV > furthest_B1
    is_dropped_BV[..., 0] = False  # keep the nearest, even where its distance is NaN
    return logits_BV.masked_fill(is_dropped_BV.scatter(-1, order_BV, is_dropped_BV), -inf)


def draw(logits_BV: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> list[int]:
    """Choose the next token of each row, as a function of the row's logits and number alone.

    Args:
        uniforms: A number in [0, 1) for each row; greedy decoding ignores them.
    """
    if sampling.is_greedy:
        return logits_BV.argmax(-1).tolist()
    top_k = sampling.top_k
    if top_k is None or top_k >= logits_BV.shape[-1] or sampling.typical_p is not None:
        sums_BV = probabilities(logits_BV, sampling).cpu().cumsum(-1, dtype=torch.float64)
        numbers_B1 = torch.tensor([[uniform * BELOW_ONE] for uniform in uniforms], dtype=torch.float64)
        return torch.searchsorted(sums_BV, numbers_B1 * sums_BV[:, -1:], right=True)[:, 0].tolist()
    # After top-k, everything works on about k numbers instead of V. For one stream, Python handles them in less time
    # than twenty calls of operations; for more streams, numpy finds them in a fraction of torch's time.
    if len(uniforms) == 1:
        values, ids = (x.tolist() for x in logits_BV[0].topk(top_k + 1))
        if values[top_k - 1] > values[top_k]:  # or else tokens tied with the k-th stay too
            return [ids[_draw_place(values[:top_k], sampling, uniforms[0])]]
    values_BN, ids_BN = largest(logits_BV.float().numpy(force=True), top_k)
    places_B = _draw_places(values_BN, top_k, sampling, np.array(uniforms))
    return ids_BN[np.arange(len(places_B)), places_B].tolist()


def _draw_place(values: Sequence[float], sampling: Sampling, uniform: float) -> int:
    """`_draw_places` for one row, given exactly what top-k keeps."""
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
    return 0  # rounding used up the last bit of the sum: the most probable token is always allowed


def _draw_places(values_BN: np.ndarray, top_k: int, sampling: Sampling, uniforms_B: np.ndarray) -> np.ndarray:
    """Draw from logits in falling order; return the places drawn, (B,).

    Sums run from left to right and absent candidates weigh nothing, so no row depends on the others.
    """
    weights_BN = np.exp((values_BN - values_BN[:, :1]) / sampling.temperature)
    weights_BN[values_BN < values_BN[:, top_k - 1, None]] = 0  # tokens tied with the k-th stay
    sums_BN = weights_BN.cumsum(1)
    if sampling.top_p is not None:
        total_B1 = sums_BN[:, -1:]
        is_dropped_BN = total_B1 - sums_BN + weights_BN <= (1 - sampling.top_p) * total_B1
        is_dropped_BN[:, 0] = False
        weights_BN[is_dropped_BN] = 0
    if sampling.min_p is not None:
        weights_BN[weights_BN < sampling.min_p] = 0
    if sampling.top_p is not None or sampling.min_p is not None:
        sums_BN = weights_BN.cumsum(1)
    return (sums_BN <= uniforms_B[:, None] * BELOW_ONE * sums_BN[:, -1:]).sum(1)


def largest(logits_BV: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` largest logits of each row and all tied with them, in falling order, and their ids.

    The k-th largest maximum of groups of ids is a bound that at least k logits reach, and few others: finding it reads
    each logit once.

    Returns:
        (B, N) twice, float64 and int64, with N at least `count`. After these a row holds a few smaller logits, then
        minus infinity.
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
    order_BN = values_BN.argsort(axis=1, kind="stable")[:, ::-1]  # among ties the last comes first, as top-p keeps it
    return np.take_along_axis(values_BN, order_BN, 1), np.take_along_axis(ids_BN, order_BN, 1)


class Repetition:
    """The repetition penalty and the ban on repeated n-grams for rows of growing text, at a constant cost per step.

    Args:
        rows: The texts so far.
        device: Device of the logits.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], sampling: Sampling, vocab_size: int, device: torch.device
    ) -> None:
        self._penalty = sampling.repetition_penalty or 1.0
        self._is_seen_BV = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
        for i, row in enumerate(rows):
            self._is_seen_BV[i, list(row)] = True
        size = sampling.no_repeat_ngram_size
        self._ngrams = [_Ngrams(size, row) for row in rows] if size is not None else []

    def applied(self, logits_BV: Tensor) -> Tensor:
        """Return the logits after the penalty and the bans."""
        if self._penalty != 1:
            weakened_BV = torch.where(logits_BV < 0, logits_BV * self._penalty, logits_BV / self._penalty)
            logits_BV = torch.where(self._is_seen_BV, weakened_BV, logits_BV)
        banned = [(i, token) for i, ngrams in enumerate(self._ngrams) for token in ngrams.banned()]
        if banned:
            logits_BV = logits_BV.clone()
            logits_BV[tuple(torch.tensor(banned).T)] = -inf
        return logits_BV

    def append(self, tokens: Sequence[int]) -> None:
        """Append one token to each row."""
        self._is_seen_BV[range(len(tokens)), list(tokens)] = True
        for ngrams, token in zip(self._ngrams, tokens, strict=bool(self._ngrams)):
            ngrams.extend([token])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; a row may appear more than once."""
        self._is_seen_BV = self._is_seen_BV[list(rows)]
        if self._ngrams:
            self._ngrams = [deepcopy(self._ngrams[row]) for row in rows]


class _Ngrams:
    """The n-grams of a text, by their first n - 1 tokens."""

    def __init__(self, size: int, tokens: Iterable[int]) -> None:
        self._size = size
        self._last: tuple[int, ...] = ()
        self._followers: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if len(self._last) == self._size - 1:
                self._followers[self._last].add(token)
            self._last = (*self._last, token)[max(0, len(self._last) + 2 - self._size) :]

    def banned(self) -> set[int]:
        """Return the tokens that would complete an n-gram of the text; none while the text is shorter than n - 1."""
        return self._followers.get(self._last, set())
