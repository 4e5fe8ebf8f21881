"""Compare two models: predictions, representations, heads and weights.

Shapes: B batch, T position, S source position, Vocab vocab_size, P predicted tokens, K positions with a prediction, A
and B layers of the two and their embeddings, E and F their widths, H and G their heads, counted through the layers, N
tokens, M matched heads or tensors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.components.kernels import IGNORED, linear_cross_entropy_losses
from lumiere.components.short_repr import ShortRepr
from lumiere.data.batches import Batch, documents_of
from lumiere.data.dataset import Sizes, TokenizedSplit
from lumiere.evaluation.scoring import (
    DocumentTotals,
    GroupSums,
    PairedDifference,
    Scores,
    document_totals,
    metrics,
    paired_difference,
    score,
    strided_windows,
)
from lumiere.interpret.head_scores import layer_matrices
from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, Result, float64, outside_unit, real_rows, rounding
from lumiere.models.transformer import Transformer, TransformerOutput


def cheapest_assignment(costs: np.ndarray) -> np.ndarray:
    """Assign rows to columns, (M, 2), each at most once and as many as possible, with the smallest sum of costs.

    The Hungarian method (Kuhn 1955, "The Hungarian Method for the Assignment Problem"; Munkres 1957) by shortest
    augmenting paths, O(n^2 m): rows are added one after the other, and potentials keep all reduced costs nonnegative.

    Args:
        costs: (N, M), finite.

    Raises:
        ValueError: a cost is not finite, as for a model with NaN among its weights.
    """
    if not np.isfinite(costs).all():
        raise ValueError("every cost of an assignment must be a finite number")
    if costs.shape[0] > costs.shape[1]:
        pairs = cheapest_assignment(costs.T)[:, ::-1]
        return pairs[np.argsort(pairs[:, 0])]
    num_rows, num_columns = costs.shape
    row_potential, column_potential = np.zeros(num_rows), np.zeros(num_columns + 1)
    row_of = np.full(num_columns + 1, -1)  # the last column is where a path starts, and belongs to no cost
    for row in range(num_rows):
        row_of[num_columns] = row
        column = num_columns
        slack, reached_from = np.full(num_columns + 1, np.inf), np.full(num_columns + 1, num_columns)
        is_used = np.zeros(num_columns + 1, dtype=bool)
        while row_of[column] >= 0:
            is_used[column] = True
            reduced = costs[row_of[column]] - row_potential[row_of[column]] - column_potential[:-1]
            is_shorter = ~is_used[:-1] & (reduced < slack[:-1])
            slack[:-1][is_shorter] = reduced[is_shorter]
            reached_from[:-1][is_shorter] = column
            following = int(np.where(is_used[:-1], np.inf, slack[:-1]).argmin())
            step = slack[following]
            row_potential[row_of[is_used]] += step
            column_potential[is_used] -= step
            slack[~is_used] -= step
            column = following
        while column != num_columns:
            row_of[column] = row_of[reached_from[column]]
            column = int(reached_from[column])
    columns = np.flatnonzero(row_of[:-1] >= 0)
    pairs = np.stack([row_of[columns], columns], axis=1)
    return pairs[np.argsort(pairs[:, 0])]


class LinearCka:
    """Linear CKA of all pairs of layers, accumulated over batches of tokens.

    `|Y^T X|^2 / (|X^T X| |Y^T Y|)`, Frobenius norms, X (N, E) and Y (N, F) with the mean of each column subtracted
    (Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", equation 5 with a linear kernel).
    1 for equal representations and for rotated, mirrored or scaled ones; other linear maps change it. This is the
    biased estimate of that paper: two unrelated representations have about (E + F) / N where N is not much larger than
    the widths, so give it many tokens. For few tokens, the debiased estimate (Székely & Rizzo 2014; for CKA, Nguyen et
    al. 2021) is better; it needs the dot products of all pairs of tokens.

    Sums are in float64. Columns are measured from the means of the first part, so that a large mean costs no digits.
    Tokens are kept as they are until they take more memory than half of the products of all pairs, E x F each, which
    then take their place.
    """

    def __init__(self) -> None:
        self.num_tokens = self.num_first = 0
        self.shifts: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.kept: list[list[Tensor]] = []
        self.products: dict[tuple[int, int], Tensor] = {}

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Add the same N tokens of both models: A times (N, E), B times (N, F)."""
        xs = [x.cpu() for x in (*first, *second)]
        if not self.num_tokens:
            self.num_first, self.shifts = len(first), [x.double().mean(0) for x in xs]
        sums = [(x.double() - shift).sum(0) for x, shift in zip(xs, self.shifts, strict=True)]
        self.sums = [total + part for total, part in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.num_tokens += len(xs[0])
        self.kept.append(xs)
        kept_bytes = sum(x.nbytes for xs in self.kept for x in xs)
        if self.products or kept_bytes > sum(8 * len(self.sums[i]) * len(self.sums[j]) for i, j in self._pairs()) / 2:
            self.products = {pair: self._product(*pair) for pair in self._pairs()}
            self.kept = []

    def similarities(self) -> np.ndarray:
        """Return (A, B); NaN for a representation that is the same for all tokens."""
        aligned = {(i, j): self._alignment(i, j) for i, j in self._pairs()}
        found = np.empty((self.num_first, len(self.sums) - self.num_first))
        for a, b in np.ndindex(*found.shape):
            other = self.num_first + b
            own = aligned[a, a] * aligned[other, other]
            found[a, b] = aligned[a, other] / np.sqrt(own) if own > 0 else np.nan
        return found

    def _pairs(self) -> list[tuple[int, int]]:
        """Return each representation with itself, and each of A with each of B."""
        both = range(len(self.sums))
        return [(i, i) for i in both] + list(product(both[: self.num_first], both[self.num_first :]))

    def _product(self, i: int, j: int) -> Tensor:
        """Return X^T Y before centering: the same way for all pairs, so that equal ones are so to the last bit."""
        total = self.products.get((i, j))
        for xs in self.kept:
            x, y = (xs[k].double() - self.shifts[k] for k in (i, j))
            total = x.T @ y if total is None else total + x.T @ y
        assert total is not None
        return total

    def _alignment(self, i: int, j: int) -> float:
        """Return the squared Frobenius norm of the centered product."""
        centered = self._product(i, j) - torch.outer(self.sums[i], self.sums[j]) / self.num_tokens
        return float(centered.square().sum())


def pattern_divergences(first_BHTS: Tensor, second_BGTS: Tensor, is_real_BT: Tensor) -> np.ndarray:
    """Sum the Jensen-Shannon divergences of two heads' rows, (H, G), in bits, over the rows that count.

    `H((p + q) / 2) - (H(p) + H(q)) / 2` with the entropy H (Lin 1991, "Divergence Measures Based on the Shannon
    Entropy", equation 4.1): 0 for equal rows, 1 where no token has weight in both.

    Args:
        first_BHTS, second_BGTS: patterns on the same tokens, rows summing to 1.
        is_real_BT: the rows that count; others may hold anything.
    """
    found = np.empty((first_BHTS.shape[1], second_BGTS.shape[1]))
    # Each head in its own memory, so that equal patterns have equal entropies to the last bit.
    firsts, seconds = (
        [(p_BTS, torch.special.entr(p_BTS)) for p_BTS in (patterns[:, head].contiguous() for head in range(count))]
        for patterns, count in zip((first_BHTS, second_BGTS), found.shape, strict=True)
    )
    for h, (p_BTS, p_entropy) in enumerate(firsts):
        for g, (q_BTS, q_entropy) in enumerate(seconds):
            each_BT = (torch.special.entr((p_BTS + q_BTS) / 2) - (p_entropy + q_entropy) / 2).sum(-1)
            found[h, g] = each_BT.clamp(min=0)[is_real_BT].cpu().sum(dtype=torch.float64).item() / np.log(2)
    return found


@dataclass(frozen=True)
class WeightChanges(ShortRepr):
    """The tensors that both models have in the same shape, (M,), computed in float64.

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
    """Compute `|W_B - W_A|_F`, the same relative to `|W_A|_F`, and `|W_B - W_A|_2` of each tensor.

    The two norms are equal for a change along one direction; for a change that is spread over all n directions, the
    spectral norm is smaller by the root of n.

    Args:
        left_out: tensors not to compare, which are named among the other ones.
    """
    a, b = first.state_dict(), second.state_dict()
    shared = [name for name in a if name in b and a[name].shape == b[name].shape and name not in left_out]
    found = np.empty((3, len(shared)))
    for column, name in enumerate(shared):  # one at a time: in float64, all of them take more memory than both models
        old, difference = float64(a[name]), float64(b[name])
        difference = difference - old
        norm = float(np.linalg.norm(difference))
        # A matrix has a spectral norm; the largest singular value of a vector is its length.
        found[:, column] = norm, relative(norm, old), np.linalg.norm(difference, 2)
    return WeightChanges(
        tensors=tuple(shared),
        change_norms=found[0],
        relative_changes=found[1],
        spectral_changes=found[2],
        other_tensors=tuple(name for name in dict.fromkeys([*a, *b]) if name not in shared),
    )


def relative(change: float, weight: np.ndarray) -> float:
    size = np.linalg.norm(weight)
    return 0.0 if change == 0 else float(change / size) if size > 0 else float("nan")


def circuit_changes(first: Transformer, second: Transformer, matches: np.ndarray) -> dict[str, np.ndarray]:
    """Return relative Frobenius changes of the circuits of matched heads, `ov_changes` and `qk_changes`, (M,) each; NaN
    if the widths of the residual streams differ.

    `|C_B - C_A| / |C_A|` with C = W_V W_O or W_Q W_K^T, (E, E) for row vectors, with the norms' gains in the matrices
    that read (Elhage et al. 2021). Unlike the weights, they do not depend on a head's own basis. They do depend on the
    basis of the residual stream, so they are comparable only for two models with a common past.

    Args:
        matches: (M, 2) heads of the one and of the other, counted through all layers.
    """
    found = np.full((2, len(matches)), np.nan)
    if first.embedding_size == second.embedding_size:
        # A layer at a time: in float64, all of them take more memory than both models.
        sides = [lru_cache(maxsize=1)(partial(layer_matrices, model)) for model in (first, second)]
        for column, heads in enumerate(matches.tolist()):
            places = (divmod(head, model.num_heads) for head, model in zip(heads, (first, second), strict=True))
            (ov_a, qk_a), (ov_b, qk_b) = (
                (reads[head] @ writes[head], queries[head] @ keys[head].T)
                for (layer, head), side in zip(places, sides, strict=True)
                for reads, writes, queries, keys in [side(layer)]
            )
            for row, (old, new) in enumerate(((ov_a, ov_b), (qk_a, qk_b))):
                found[row, column] = relative(float(np.linalg.norm(new - old)), old)
    return dict(zip(("ov_changes", "qk_changes"), found, strict=True))


LOGITS_AT_ONCE = 2**20
"""8 MB in float64."""


@dataclass(frozen=True)
class PredictionDiff(ShortRepr):
    """Predictions of both models for each predicted token, (P,), in float64 nats.

    Attributes:
        sequences: which sequence it stands in.
        positions: its position there: how many tokens come before.
        targets: its id.
        losses_a, losses_b: -ln p(token) by A and by B.
        kl_ab, kl_ba: of the whole predictions there, KL(A || B) and KL(B || A).
        same_choice: the probability that both choose the same token, if each chooses among its most probable ones.
        position_numbers: (K,) the positions that have predictions.
        kl_ab_by_position, kl_ba_by_position: (K,) the means there.
    """

    sequences: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    losses_a: np.ndarray
    losses_b: np.ndarray
    kl_ab: np.ndarray
    kl_ba: np.ndarray
    same_choice: np.ndarray
    position_numbers: np.ndarray
    kl_ab_by_position: np.ndarray
    kl_ba_by_position: np.ndarray


def compare_predictions(
    batch: Batch, first_BTVocab: Tensor, second_BTVocab: Tensor, first_sequence: int
) -> Iterator[dict[str, np.ndarray]]:
    """Compare two models on the targets of a batch; yield columns of `PredictionDiff`, (P,), in chunks of logits.

    Args:
        first_sequence: the number of the batch's first sequence.
    """
    places_P2 = (batch.targets != IGNORED).nonzero()
    for part_P2 in places_P2.split(max(1, LOGITS_AT_ONCE // first_BTVocab.shape[-1])):
        rows_P, columns_P = part_P2.unbind(1)
        targets_P = batch.targets[rows_P, columns_P].cpu()
        log_p, log_q = (x[rows_P, columns_P].cpu().double().log_softmax(-1) for x in (first_BTVocab, second_BTVocab))
        ratio = log_p - log_q
        columns = {
            "sequences": rows_P.cpu() + first_sequence,
            "positions": columns_P.cpu() + 1,
            "targets": targets_P,
            "losses_a": -log_p.gather(1, targets_P[:, None])[:, 0],
            "losses_b": -log_q.gather(1, targets_P[:, None])[:, 0],
            "kl_ab": (log_p.exp() * ratio).sum(-1),
            "kl_ba": (log_q.exp() * -ratio).sum(-1),
            "same_choice": same_choices(log_p, log_q),
        }
        yield {name: values.numpy() for name, values in columns.items()}


def join_predictions(parts: Sequence[Mapping[str, np.ndarray]]) -> PredictionDiff:
    """Concatenate the columns of `compare_predictions` over all batches."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    numbers, places = np.unique(columns["positions"], return_inverse=True)
    counts = np.bincount(places)
    means = {f"{name}_by_position": np.bincount(places, columns[name]) / counts for name in ("kl_ab", "kl_ba")}
    return PredictionDiff(**columns, position_numbers=numbers, **means)


def same_choices(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return whether the top tokens agree, (P,): 0 or 1, or a fraction if tokens are tied for the first place."""
    tops_p, tops_q = (values == values.amax(-1, keepdim=True) for values in (log_p, log_q))
    return (tops_p & tops_q).sum(-1) / (tops_p.sum(-1) * tops_q.sum(-1))


def paired_losses(found: PredictionDiff, documents_S: np.ndarray) -> PairedDifference | None:
    """Return B's mean loss minus A's with an interval, by resampling documents; None for a single document.

    Args:
        documents_S: which document each sequence is cut from.
    """
    _, documents = np.unique(documents_S[found.sequences], return_inverse=True)
    counts = np.bincount(documents)
    unknown = np.zeros(len(counts))  # what a mean loss does not need
    base, other = (
        DocumentTotals(np.bincount(documents, losses), counts, unknown, unknown, counts, unknown, unknown, unknown)
        for losses in (found.losses_a, found.losses_b)
    )
    return paired_difference(base, other, "loss")


def evaluation_error(model: Transformer, batch: Batch, losses_P: np.ndarray) -> float:
    """Return the error of the first losses against those of the fused loss, relative to the largest."""
    with torch.inference_mode():
        residual = model.final_residual(batch.tokens)[batch.targets != IGNORED]
        targets_P = batch.targets[batch.targets != IGNORED]
        expected = linear_cross_entropy_losses(residual, model.unembedding, targets_P).cpu().double().numpy()
    return float(np.abs(losses_P[: len(expected)] - expected).max() / max(1.0, expected.max()))


PATTERN_SEQUENCES = 32
"""Sequences, the first ones, on which patterns are compared: each pair of heads takes as long as a pass."""
SAME_TOKENS, OTHER_TOKENS = "nats a token", "bits a byte"


@dataclass(frozen=True)
class HeadMatches(ShortRepr):
    """Heads of A and their partners in B.

    Attributes:
        heads_a, heads_b: (H,), (G,) layer and head of each, such as `L0H1`.
        pattern_divergences: (H, G) mean Jensen-Shannon divergence of the rows in bits, from 0 to 1; NaN where the two
            were not to be matched, being in different layers.
        matches: (M, 2) places in `heads_a` and `heads_b`; with the least sum of divergences.
        match_divergences: (M,) of these.
        ov_changes, qk_changes: (M,) as `circuit_changes`.
        num_pattern_sequences: over how many sequences.
    """

    heads_a: tuple[str, ...]
    heads_b: tuple[str, ...]
    pattern_divergences: np.ndarray
    matches: np.ndarray
    match_divergences: np.ndarray
    ov_changes: np.ndarray
    qk_changes: np.ndarray
    num_pattern_sequences: int


@dataclass(frozen=True, kw_only=True)
class ModelDiff(Result):
    """The fields of `HeadMatches`, `PredictionDiff` and `WeightChanges`; None if the models cannot be compared.

    Attributes:
        tokens: the ids of each sequence, with its last target; none where the tokenizers differ.
        not_compared: what was left out, and why.
        losses: (2,) the mean loss of A and of B.
        loss_unit: `nats a token`; `bits a byte` where the tokenizers differ.
        loss_difference: B less A, by the bootstrap over documents; None where there is but one.
        cka: (A + 1, B + 1) of the residual streams after the embedding and after each block.
        num_cka_tokens: over how many tokens.
        across_layers: whether heads were matched across layers.
    """

    DISCRETE = frozenset({"same_choice"})

    tokens: tuple[tuple[int, ...], ...]
    not_compared: tuple[str, ...]
    losses: np.ndarray
    loss_unit: str
    loss_difference: PairedDifference | None
    predictions: PredictionDiff | None = None
    cka: np.ndarray | None = None
    num_cka_tokens: int = 0
    across_layers: bool = False
    heads: HeadMatches | None = None
    weights: WeightChanges

    def as_dict(self) -> dict[str, Any]:
        """Return the fields with those of the parts."""
        values = super().as_dict()
        parts = [values.pop(name) for name in ("predictions", "heads", "weights")]
        return values | {name: value for part in parts if part is not None for name, value in vars(part).items()}

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield one number a row: a quantity and its places in A and B, without the numbers of single tokens."""

        def rows(quantity: str, labels_a: Iterable[Any], labels_b: Iterable[Any], values: Any) -> Iterator[Any]:
            for a, b, value in zip(labels_a, labels_b, np.ravel(values).tolist(), strict=True):
                yield {"quantity": quantity, "a": f"{a}", "b": f"{b}", "value": value}

        for name, value in zip("ab", self.losses, strict=True):
            yield from rows(f"loss_{name}", [""], [""], value)
        if (found := self.predictions) is not None:
            for name in ("kl_ab", "kl_ba", "same_choice"):
                yield from rows(name, [""], [""], getattr(found, name).mean())
            for name in ("kl_ab_by_position", "kl_ba_by_position"):
                yield from rows(name, found.position_numbers, found.position_numbers, getattr(found, name))
        if self.cka is not None:
            labels_a, labels_b = zip(*product(*(stream_names(count - 1) for count in self.cka.shape)), strict=True)
            yield from rows("cka", labels_a, labels_b, self.cka)
        if (heads := self.heads) is not None:
            labels = [heads.heads_a[a] for a in heads.matches[:, 0]], [heads.heads_b[b] for b in heads.matches[:, 1]]
            for name in ("match_divergences", "ov_changes", "qk_changes"):
                yield from rows(name.removesuffix("s"), *labels, getattr(heads, name))
        for name in ("relative_changes", "change_norms", "spectral_changes"):
            tensors = self.weights.tensors
            yield from rows(name.removesuffix("s"), tensors, tensors, getattr(self.weights, name))


def stream_names(num_layers: int) -> list[str]:
    """Return the compared places of the residual stream."""
    return ["embedding", *(f"L{layer}" for layer in range(num_layers))]


def diff_models(
    first: Transformer, second: Transformer, batches: Sequence[Batch], *, across_layers: bool = False
) -> ModelDiff:
    """Compare two models with the same tokenizer on the same tokens. Their sizes may differ.

    Predictions: KL(A || B) = sum p_A ln(p_A / p_B), what is lost by expecting B where A is right, and KL(B || A)
    (Kullback & Leibler 1951, "On Information and Sufficiency"). Representations: linear CKA (`LinearCka`). Heads: the
    assignment with the least sum of the divergences of their patterns (`pattern_divergences`, from position 1 on,
    since position 0 sees only itself), within a layer or across all of them. Unlike the similarity of circuits, which
    others match by, this also compares models that were trained separately. Weights: `weight_changes`.

    Args:
        first, second: A and B, in evaluation mode, on one device and in one type, with equal vocabularies.
        batches: sequences; only the start is read of those longer than the shorter of the two contexts.
        across_layers: match heads of any layers; always so if the numbers of layers differ.

    Raises:
        ValueError: the vocabularies differ.
    """
    if first.vocab_size != second.vocab_size:
        raise ValueError(f"the vocabularies have {first.vocab_size} and {second.vocab_size} tokens")
    length = min(first.context_size, second.context_size)
    batches = [shortened(batch, length).to(first.token_embedding.weight.device) for batch in batches]
    across_layers = across_layers or first.num_layers != second.num_layers
    cka, matcher, parts, num_sequences = LinearCka(), HeadMatcher(first, second, across_layers), [], 0
    with torch.inference_mode():
        for batch in batches:
            outputs = first(batch.tokens), second(batch.tokens)
            parts.extend(compare_predictions(batch, outputs[0].logits, outputs[1].logits, num_sequences))
            num_sequences += len(batch.tokens)
            is_real_BT = batch.is_real
            cka.add(*([stream[is_real_BT] for stream in output.residuals] for output in outputs))
            matcher.add(*outputs, is_real_BT)
    predictions = join_predictions(parts)
    similarities, weights = cka.similarities(), weight_changes(first, second)
    heads = matcher.match()
    sides = (first, predictions.losses_a), (second, predictions.losses_b)
    evaluation = max(evaluation_error(model, batches[0], losses) for model, losses in sides)
    below_zero = max(0.0, -float(predictions.kl_ab.min()), -float(predictions.kl_ba.min()))
    receipts = [
        Receipt("the losses are those of an evaluation", evaluation, rounding(first)),
        Receipt("no KL is negative", below_zero, FLOAT64_TOLERANCE),
        Receipt("CKA lies between 0 and 1", outside_unit(similarities), FLOAT64_TOLERANCE),
    ]
    if heads is not None:
        outside = outside_unit(heads.pattern_divergences)
        receipts.append(Receipt("divergences lie between 0 and 1", outside, rounding(first)))
    return ModelDiff(
        tokens=tuple(row for batch in batches for row in real_rows(batch)),
        not_compared=() if heads else ("heads: there is only one position, and a single token to look at",),
        losses=np.array([predictions.losses_a.mean(), predictions.losses_b.mean()]),
        loss_unit=SAME_TOKENS,
        loss_difference=paired_losses(predictions, documents_of(batches)),
        predictions=predictions,
        cka=similarities,
        num_cka_tokens=cka.num_tokens,
        across_layers=across_layers,
        heads=heads,
        weights=weights,
        receipts=(*receipts, weight_receipt(weights)),
    )


def diff_texts(first: Transformer, second: Transformer, texts: Sequence[tuple[TokenizedSplit, Sizes]]) -> ModelDiff:
    """Compare two models with different tokenizers on the same documents: bits per byte, and weights of equal shape.

    Each token is scored once, in windows that share one token.

    Args:
        first, second: A and B, in evaluation mode.
        texts: the documents in the tokens of A and of B, and their sizes, from `document_sizes`.
    """
    totals = []
    for model, (split, sizes) in zip((first, second), texts, strict=True):
        windows, protocol = strided_windows(split, model.context_size, model.context_size)
        sums = GroupSums(split.facts.num_documents, 3)

        def add(scores: Scores, sums: GroupSums = sums) -> None:
            sums.add(scores.documents, scores.losses, scores.at_1, scores.at_5)

        score(model, windows, protocol.once, {}, add)
        totals.append(document_totals(split, sizes, protocol, sums.counts, *sums.sums))
    weights = weight_changes(first, second, left_out=("token_embedding.weight", "output_head.weight"))
    return ModelDiff(
        tokens=(),
        not_compared=("predictions, representations and heads: the tokenizers differ, so no two tokens are the same",),
        losses=np.array([float(metrics(total.total).bits_per_byte) for total in totals]),
        loss_unit=OTHER_TOKENS,
        loss_difference=paired_difference(totals[0], totals[1], "bits_per_byte"),
        weights=weights,
        receipts=(weight_receipt(weights),),
    )


class HeadMatcher:
    """Divergences of the pairs of heads that may be matched, summed over rows, and the heads that they match."""

    def __init__(self, first: Transformer, second: Transformer, across_layers: bool) -> None:
        self.models, self.across_layers = (first, second), across_layers
        layers = product(range(first.num_layers), range(second.num_layers))
        self.layers = [(a, b) for a, b in layers if across_layers or a == b]
        self.sums = np.zeros((first.num_layers, first.num_heads, second.num_layers, second.num_heads))
        self.num_rows = self.num_sequences = 0

    def add(self, first: TransformerOutput, second: TransformerOutput, is_real_BT: torch.Tensor) -> None:
        """Add the patterns of a batch, up to `PATTERN_SEQUENCES` sequences in all."""
        count = min(len(is_real_BT), PATTERN_SEQUENCES - self.num_sequences)
        counts_BT = is_real_BT[:count].clone()
        counts_BT[:, 0] = False
        if not counts_BT.any():
            return
        for a, b in self.layers:
            self.sums[a, :, b] += pattern_divergences(first.patterns[a][:count], second.patterns[b][:count], counts_BT)
        self.num_sequences += count
        self.num_rows += int(counts_BT.sum())

    def match(self) -> HeadMatches | None:
        """Match the heads; None if no row was compared."""
        if not self.num_rows:
            return None
        means = np.full_like(self.sums, np.nan)
        for a, b in self.layers:
            means[a, :, b] = self.sums[a, :, b] / self.num_rows
        num_heads, num_partners = (model.num_heads for model in self.models)
        found = means.reshape(len(means) * num_heads, -1)
        if self.across_layers:
            matches = cheapest_assignment(found)
        else:
            corners = [(layer * num_heads, layer * num_partners) for layer in range(len(means))]
            parts = [cheapest_assignment(means[layer, :, layer]) + corner for layer, corner in enumerate(corners)]
            matches = np.concatenate(parts)
        names = [
            tuple(f"L{layer}H{head}" for layer, head in np.ndindex(model.num_layers, model.num_heads))
            for model in self.models
        ]
        return HeadMatches(
            heads_a=names[0],
            heads_b=names[1],
            pattern_divergences=found,
            matches=matches,
            match_divergences=found[tuple(matches.T)],
            **circuit_changes(*self.models, matches),
            num_pattern_sequences=self.num_sequences,
        )


def shortened(batch: Batch, length: int) -> Batch:
    """Return the first `length` positions of a batch."""
    tokens, targets = batch.tokens[:, :length].contiguous(), batch.targets[:, :length]
    return replace(batch, tokens=tokens, targets=targets, num_targets=int((targets != IGNORED).sum()))


def weight_receipt(weights: WeightChanges) -> Receipt:
    """Check ||D||_2 <= ||D||_F."""
    excess = (weights.spectral_changes - weights.change_norms).max(initial=0.0)
    return Receipt("no spectral norm exceeds the Frobenius norm", float(excess), FLOAT64_TOLERANCE)
