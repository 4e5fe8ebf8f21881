"""What is different between two models: their predictions, representations, heads and weights.

Shapes: B batch, T position, P predicted tokens, K positions with a prediction, A and B layers of the two and their
embeddings, H and G all heads of the one and the other, counted through the layers, M matched heads, W tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lumiere.components.kernels import IGNORED
from lumiere.components.short_repr import ShortRepr
from lumiere.data.batches import Batch, documents_of
from lumiere.data.dataset import Sizes, TokenizedSplit
from lumiere.data.tokenizer import PAD
from lumiere.evaluation.scoring import (
    GroupSums,
    PairedDifference,
    document_totals,
    figures,
    paired_difference,
    score,
    strided_windows,
)
from lumiere.interpret.assignment import cheapest_assignment
from lumiere.interpret.predictions import PredictionDiff, compare_predictions, evaluation_error, paired_losses
from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, Result, rounding
from lumiere.interpret.similarity import LinearCka, pattern_divergences
from lumiere.interpret.weight_changes import WeightChanges, circuit_changes, weight_changes
from lumiere.models.transformer import Transformer, TransformerOutput

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
    """Everything of `HeadMatches`, `PredictionDiff` and `WeightChanges`; None where the two cannot be compared.

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
    predictions: PredictionDiff | None
    cka: np.ndarray | None
    num_cka_tokens: int
    across_layers: bool
    heads: HeadMatches | None
    weights: WeightChanges

    def as_dict(self) -> dict[str, Any]:
        """The parts' fields beside the own ones."""
        values = super().as_dict()
        parts = [values.pop(name) for name in ("predictions", "heads", "weights")]
        return values | {name: value for part in parts if part is not None for name, value in vars(part).items()}

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """One number a row: of what, of which place in A and in B. The numbers of single tokens are left out."""
        for name, value in zip("ab", self.losses.tolist(), strict=True):
            yield row(f"loss_{name}", "", "", value)
        if (found := self.predictions) is not None:
            yield row("kl_ab", "", "", float(found.kl_ab.mean()))
            yield row("kl_ba", "", "", float(found.kl_ba.mean()))
            yield row("same_choice", "", "", float(found.same_choice.mean()))
            for name in ("kl_ab_by_position", "kl_ba_by_position"):
                for position, value in zip(found.position_numbers.tolist(), getattr(found, name).tolist(), strict=True):
                    yield row(name, f"{position}", f"{position}", value)
        if self.cka is not None:
            names_a, names_b = (stream_names(count - 1) for count in self.cka.shape)
            for a, b in np.ndindex(*self.cka.shape):
                yield row("cka", names_a[a], names_b[b], float(self.cka[a, b]))
        if (heads := self.heads) is not None:
            for name in ("match_divergences", "ov_changes", "qk_changes"):
                for (a, b), value in zip(heads.matches, getattr(heads, name).tolist(), strict=True):
                    yield row(name.removesuffix("s"), heads.heads_a[a], heads.heads_b[b], value)
        for name in ("relative_changes", "change_norms", "spectral_changes"):
            for tensor, value in zip(self.weights.tensors, getattr(self.weights, name).tolist(), strict=True):
                yield row(name.removesuffix("s"), tensor, tensor, value)


def row(quantity: str, a: str, b: str, value: float) -> dict[str, Any]:
    return {"quantity": quantity, "a": a, "b": b, "value": value}


def stream_names(num_layers: int) -> list[str]:
    """The places of the residual stream that are compared."""
    return ["embedding", *(f"L{layer}" for layer in range(num_layers))]


def diff(
    first: Transformer, second: Transformer, batches: Sequence[Batch], *, across_layers: bool = False
) -> ModelDiff:
    """Compares two models on the same tokens, which they read by the same tokenizer. Their sizes may differ.

    Predictions: KL(A || B) = sum p_A ln(p_A / p_B), what is lost by expecting B where A is right, and KL(B || A)
    (Kullback & Leibler 1951, "On Information and Sufficiency"). Representations: linear CKA (`LinearCka`). Heads: the
    assignment with the least sum of the divergences of their patterns (`pattern_divergences`, from position 1 on,
    since position 0 sees only itself), within a layer or across all of them. Others match by the similarity of
    circuits, which says nothing of two models that were trained apart: these have no coordinates in common, and what
    a head looks at is comparable all the same. Weights: `weight_changes`.

    Args:
        first, second: A and B, in evaluation mode, on one device and in one type, with equal vocabularies.
        batches: sequences; of those that are longer than one of the models takes, the start.
        across_layers: match heads of any layers; always so where the two have not as many layers.

    Raises:
        ValueError: the vocabularies differ.
    """
    if first.vocab_size != second.vocab_size:
        raise ValueError(f"the vocabularies have {first.vocab_size} and {second.vocab_size} tokens")
    length = min(first.context_size, second.context_size)
    batches = [shortened(batch, length).to(first.token_embedding.weight.device) for batch in batches]
    across_layers = across_layers or first.num_layers != second.num_layers
    cka, patterns, parts = LinearCka(), PatternSums(across_layers), []
    with torch.inference_mode():
        for batch in batches:
            outputs = first(batch.tokens), second(batch.tokens)
            parts.append(compare_predictions(batch, *(output.logits for output in outputs)))
            is_real_BT = batch.tokens != PAD
            cka.add(*([stream[is_real_BT] for stream in output.residuals] for output in outputs))
            patterns.add(*outputs, is_real_BT)
    predictions = PredictionDiff.join(parts)
    similarities, weights = cka.similarities(), weight_changes(first, second)
    heads = match_heads(first, second, patterns)
    return ModelDiff(
        tokens=tuple(rows_of(batches)),
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
        receipts=(
            Receipt(
                "the losses are those of an evaluation",
                max(
                    evaluation_error(first, batches[0], predictions.losses_a),
                    evaluation_error(second, batches[0], predictions.losses_b),
                ),
                rounding(first),
            ),
            Receipt("no KL is negative", below_zero(predictions.kl_ab, predictions.kl_ba), FLOAT64_TOLERANCE),
            Receipt("CKA lies between 0 and 1", beyond_1(similarities), FLOAT64_TOLERANCE),
            *pattern_receipts(heads, rounding(first)),
            weight_receipt(weights),
        ),
    )


def diff_texts(first: Transformer, second: Transformer, texts: Sequence[tuple[TokenizedSplit, Sizes]]) -> ModelDiff:
    """Compares two models whose tokenizers differ on the same documents: bits per byte, and weights of equal shape.

    Each token is scored once, in windows that share one token.

    Args:
        first, second: A and B, in evaluation mode.
        texts: the documents in the tokens of A and of B, and their sizes, from `document_sizes`.
    """
    totals = []
    for model, (split, sizes) in zip((first, second), texts, strict=True):
        windows, protocol = strided_windows(split, model.context_size, model.context_size)
        sums = GroupSums(split.facts.num_documents, 3)
        score(
            model,
            windows,
            protocol.once,
            {},
            lambda scores, sums=sums: sums.add(scores.documents, scores.losses, scores.at_1, scores.at_5),
        )
        totals.append(document_totals(split, sizes, sums.counts, *sums.sums))
    weights = weight_changes(first, second, left_out=("token_embedding.weight",))
    return ModelDiff(
        tokens=(),
        not_compared=("predictions, representations and heads: the tokenizers differ, so no two tokens are the same",),
        losses=np.array([float(figures(total.total).bits_per_byte) for total in totals]),
        loss_unit=OTHER_TOKENS,
        loss_difference=paired_difference(totals[0], totals[1], "bits_per_byte"),
        predictions=None,
        cka=None,
        num_cka_tokens=0,
        across_layers=False,
        heads=None,
        weights=weights,
        receipts=(weight_receipt(weights),),
    )


class PatternSums:
    """Divergences of the pairs of heads that may be matched, summed over rows."""

    def __init__(self, across_layers: bool) -> None:
        self.across_layers = across_layers
        self.sums: dict[tuple[int, int], np.ndarray] = {}
        self.num_rows = self.num_sequences = 0

    def add(self, first: TransformerOutput, second: TransformerOutput, is_real_BT: torch.Tensor) -> None:
        """Takes in the patterns of a batch, until there were `PATTERN_SEQUENCES` sequences."""
        count = min(len(is_real_BT), PATTERN_SEQUENCES - self.num_sequences)
        counts_BT = is_real_BT[:count].clone()
        counts_BT[:, 0] = False
        if not counts_BT.any():
            return
        for a, patterns_a in enumerate(first.patterns):
            for b, patterns_b in enumerate(second.patterns):
                if self.across_layers or a == b:
                    found = pattern_divergences(patterns_a[:count], patterns_b[:count], counts_BT)
                    self.sums[a, b] = self.sums.get((a, b), 0.0) + found
        self.num_sequences += count
        self.num_rows += int(counts_BT.sum())


def match_heads(first: Transformer, second: Transformer, patterns: PatternSums) -> HeadMatches | None:
    """The heads' partners; None where no row was compared."""
    if not patterns.num_rows:
        return None
    heads, partners = first.num_heads, second.num_heads
    found = np.full((first.num_layers * heads, second.num_layers * partners), np.nan)
    for (a, b), total in patterns.sums.items():
        found[a * heads : (a + 1) * heads, b * partners : (b + 1) * partners] = total / patterns.num_rows
    if patterns.across_layers:
        matches = cheapest_assignment(found)
    else:
        corners = [np.array([layer * heads, layer * partners]) for layer in range(first.num_layers)]
        blocks = [found[a : a + heads, b : b + partners] for a, b in corners]
        matches = np.concatenate([cheapest_assignment(x) + corner for x, corner in zip(blocks, corners, strict=True)])
    return HeadMatches(
        heads_a=head_names(first),
        heads_b=head_names(second),
        pattern_divergences=found,
        matches=matches,
        match_divergences=found[tuple(matches.T)],
        **circuit_changes(first, second, matches),
        num_pattern_sequences=patterns.num_sequences,
    )


def head_names(model: Transformer) -> tuple[str, ...]:
    return tuple(f"L{layer}H{head}" for layer, head in np.ndindex(model.num_layers, model.num_heads))


def shortened(batch: Batch, length: int) -> Batch:
    """The first `length` positions of a batch."""
    if batch.tokens.shape[1] <= length:
        return batch
    targets = batch.targets[:, :length]
    return replace(
        batch,
        tokens=batch.tokens[:, :length].contiguous(),
        targets=targets,
        num_targets=int((targets != IGNORED).sum()),
    )


def rows_of(batches: Sequence[Batch]) -> Iterator[tuple[int, ...]]:
    """The ids of each sequence, with its last target, without padding."""
    for batch in batches:
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            ids = [*tokens, targets[-1] if targets[-1] != IGNORED else PAD]
            yield tuple(token for token in ids if token != PAD)


def below_zero(*values: np.ndarray) -> float:
    return max(0.0, *(-float(part.min()) for part in values))


def beyond_1(values: np.ndarray) -> float:
    """How far outside of 0 to 1 the numbers go; what is missing counts for nothing."""
    return float(np.nanmax(np.abs(values - 0.5), initial=0.5)) - 0.5


def pattern_receipts(heads: HeadMatches | None, tolerance: float) -> Iterator[Receipt]:
    if heads is not None:
        yield Receipt("divergences lie between 0 and 1", beyond_1(heads.pattern_divergences), tolerance)


def weight_receipt(weights: WeightChanges) -> Receipt:
    """||D||_2 <= ||D||_F."""
    excess = (weights.spectral_changes - weights.change_norms).max(initial=0.0)
    return Receipt("no spectral norm exceeds the Frobenius norm", float(excess), FLOAT64_TOLERANCE)
