"""Score each attention head: what it attends to, what it copies, and what the model gains from its context.

Shapes: N sequence or window, T position (destination), S position (source), L layer, H head, M score, E embedding_size,
K d_key, V d_value, C cluster (a sequence, or a token of a single one), Vocab vocab_size; P pair of heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from lumiere.components.kernels import IGNORED, linear_cross_entropy_losses
from lumiere.data.batches import PADDING
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret.result import (
    FLOAT64_TOLERANCE,
    Receipt,
    Result,
    float64,
    outside_unit,
    rounding,
    selected,
    table,
)
from lumiere.models.transformer import Transformer

SEQUENCES = 32
COPY_LENGTH = 25
"""As in Olsson et al. 2022; shorter where the context or the vocabulary is smaller."""


class TextWindows(NamedTuple):
    """Windows of real text."""

    tokens: torch.Tensor
    """(N, context_size + 1) ids, `IGNORED` at padding."""
    documents: np.ndarray
    """(N,), the document that each is cut from."""
    special_ids: frozenset[int]
    """Ids that stand for no text, such as the start of a document."""


def longest_copy(model: Transformer, num_tokens: int, num_start: int = 1) -> int:
    """Return how many of `num_tokens` different tokens fit the model twice, after `num_start` start tokens (0 or 1)."""
    return min((model.context_size - num_start) // 2, num_tokens)


def first_copied(length: int, num_start: int = 1) -> int:
    """Return the first predictable position: the second token of the second copy."""
    return length + num_start + 1


def repeated_tokens(
    num_tokens: int, length: int, num_sequences: int, seed: int, *, start: int | None, first: int
) -> torch.Tensor:
    """Return the start token and `length` different random tokens, twice, (N, 2 S + 1); (N, 2 S) without a start token.

    Drawn without replacement, so that no token repeats by chance.

    Args:
        num_tokens: how many tokens to draw from: `first`, `first` + 1, and so on.
        length: S.
        start: the id of the start token, if there is one.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(num_tokens, generator=generator)[:length] + first for _ in range(num_sequences)]
    once_NS = torch.stack(drawn)
    starts = [] if start is None else [torch.full((num_sequences, 1), start)]
    return torch.cat([*starts, once_NS, once_NS], dim=1)


COMPOSITION_KINDS = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Composition(Result):
    """Composition scores of every head with every head of a later layer.

    Attributes:
        kinds: (C,) `COMPOSITION_KINDS`.
        pairs: (P, 4) layer and head of the earlier one, layer and head of the later one.
        scores: (P, C) from 0 to 1; NaN where one of the heads writes or looks for nothing.
        chance: what two matrices without any relation score.
    """

    kinds: tuple[str, ...]
    pairs: np.ndarray
    scores: np.ndarray
    chance: float

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for (layer, head, later_layer, later_head), scores in zip(self.pairs.tolist(), self.scores, strict=True):
            place = {"layer": layer, "head": head, "later_layer": later_layer, "later_head": later_head}
            yield from ({**place, **row} for row in table({"kind": self.kinds}, score=scores, chance=self.chance))


NUMBERS_AT_ONCE = 2**24
"""Of the matrices of pairs of heads: 128 MB in float64."""


def composition_scores(model: Transformer) -> Composition:
    """Compute `|W_OV W| / (|W_OV| |W|)`, Frobenius norms, for each head and each head of a later layer.

    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". W_OV is what the earlier head reads and
    writes. W is, of the later head, W_QK for Q-composition, its transpose for K-composition, W_OV for V-composition:
    all (E, E), for row vectors, with the norms' gains in the matrices that read; with rotary positions, W_QK is that of
    a distance of 0. For matrices in random orientations, the mean square of the score is 1 / E: `chance` is its root.
    Elhage et al. subtract the score of random matrices of the same shapes, which is the same number, measured.

    Only the receipt computes (E, E) matrices: with W = a b, the squared norm of a product is a trace of products of
    (V, V) and (K, K) matrices, in float64.
    """
    reads, writes, queries, keys = head_matrices(model)
    later = {"q": (queries, keys.swapaxes(-1, -2)), "k": (keys, queries.swapaxes(-1, -2)), "v": (reads, writes)}
    own_reads, own_writes = gram(reads.swapaxes(-1, -2)), gram(writes)
    ov_norms = np.sqrt(np.einsum("lhvw,lhvw->lh", own_reads, own_writes))
    pairs, columns, errors = pair_list(model.num_layers, model.num_heads), [], [0.0]
    first, second = tuple(pairs[:, :2].T), tuple(pairs[:, 2:].T)
    for kind in COMPOSITION_KINDS:
        tall, wide = later[kind]
        later_norms = np.sqrt(np.einsum("lhkj,lhkj->lh", gram(tall.swapaxes(-1, -2)), gram(wide)))
        later_writes = gram(wide)
        squares = np.empty(len(pairs))
        at_once = max(1, NUMBERS_AT_ONCE // writes[0, 0].size)
        for part in (slice(start, start + at_once) for start in range(0, len(pairs), at_once)):
            one, other = tuple(pairs[part, :2].T), tuple(pairs[part, 2:].T)
            joined = writes[one] @ tall[other]
            factors = own_reads[one], joined, later_writes[other], joined
            squares[part] = np.einsum("pvw,pvk,pkj,pwj->p", *factors, optimize=True)
        sizes = ov_norms[first] * later_norms[second]
        with np.errstate(invalid="ignore", divide="ignore"):
            scores = np.where(sizes > 0, np.sqrt(np.maximum(squares, 0)) / sizes, np.nan)
        columns.append(scores)
        if np.isfinite(scores).any():
            best = int(np.nanargmax(scores))
            earlier, place = tuple(pairs[best, :2]), tuple(pairs[best, 2:])
            dense_ov, dense = reads[earlier] @ writes[earlier], tall[place] @ wide[place]
            expected = np.linalg.norm(dense_ov @ dense) / (np.linalg.norm(dense_ov) * np.linalg.norm(dense))
            errors.append(float(abs(scores[best] - expected)))
    scores_PC = np.stack(columns, axis=1)
    return Composition(
        kinds=COMPOSITION_KINDS,
        pairs=pairs,
        scores=scores_PC,
        chance=model.embedding_size**-0.5,
        receipts=(
            Receipt("the strongest compositions are those of the whole matrices", max(errors), FLOAT64_TOLERANCE),
            Receipt("compositions lie between 0 and 1", outside_unit(scores_PC), FLOAT64_TOLERANCE),
        ),
    )


def head_matrices(model: Transformer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return W_V (L, H, E, V), W_O (L, H, V, E), W_Q and W_K (L, H, E, K) of all layers, as `layer_matrices`."""
    layers = [layer_matrices(model, layer) for layer in range(model.num_layers)]
    reads, writes, queries, keys = (np.stack(parts) for parts in zip(*layers, strict=True))
    return reads, writes, queries, keys


def layer_matrices(model: Transformer, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return W_V (H, E, V), W_O (H, V, E), W_Q and W_K (H, E, K) of a layer, norms folded in, in float64.

    Heads that share keys and values have the same W_K and W_V. A norm of queries and keys divides each by a scale of
    its own, a number that no matrix holds; its gains are folded in.
    """
    block = model.blocks[layer]
    attention = block.attention
    gains = {"query": attention.query_norm, "key": attention.key_norm}

    def read(part: str) -> np.ndarray:
        norm, is_shared = gains.get(part), part in ("key", "value")
        num_heads = attention.num_key_value_heads if is_shared else model.num_heads
        weight = getattr(attention, part).weight.detach().cpu().double()
        heads_HKE = block.attention_norm.folded(weight)[0].unflatten(0, (num_heads, -1))
        heads_HKE = attention.per_head(heads_HKE, dim=0) if is_shared else heads_HKE
        if norm is not None and norm.weight is not None:
            heads_HKE = heads_HKE * norm.weight.to(heads_HKE)[:, None]
        return float64(heads_HKE.transpose(1, 2))

    writes = float64(attention.output.weight.T).reshape(model.num_heads, -1, model.embedding_size)
    return read("value"), writes, read("query"), read("key")


def gram(matrices: np.ndarray) -> np.ndarray:
    """Return m m^T of each matrix m."""
    return matrices @ matrices.swapaxes(-1, -2)


def pair_list(num_layers: int, num_heads: int) -> np.ndarray:
    """Return layer and head of the earlier and of the later head, (P, 4), in order; empty for a single layer."""
    places = list(np.ndindex(num_layers, num_heads))
    pairs = [(*earlier, *later) for earlier, later in product(places, places) if later[0] > earlier[0]]
    return np.array(pairs, dtype=int).reshape(-1, 4)


TOKENS_AT_ONCE = 4096
"""Tokens of a forward pass, so that long contexts do not take all memory."""


def in_context_learning(model: Transformer, text: TextWindows) -> dict[str, Any]:
    """Compute mean loss at late minus mean loss at early positions of full windows, with its standard error.

    Olsson et al. 2022 take the tokens 500 and 50 of a context of 512. Here they are bands of positions, relative to the
    context: its last quarter, and 5 % to 15 %. Scores of different context sizes do not compare.

    Only windows without padding are used.

    Returns:
        The fields `in_context_...` of `HeadScores`; none without a full window, or with a context of one token.
    """
    windows_NT, documents_N = text.tokens, text.documents
    is_full_N = windows_NT[:, -1] != IGNORED
    if model.context_size < 2 or not is_full_N.any():
        return {}
    bands = early, late = position_bands(model.context_size)
    weight, found = model.unembedding, []
    positions = [position for first, last in bands for position in range(first, last + 1)]
    for part_NT in windows_NT[is_full_N].split(max(1, TOKENS_AT_ONCE // model.context_size)):
        part_NT = part_NT.to(weight.device)
        with torch.inference_mode():
            # The loss at a position is that of predicting the token there from those before.
            residual = model.final_residual(part_NT[:, :-1])[:, [position - 1 for position in positions]]
            losses = linear_cross_entropy_losses(residual.flatten(0, 1), weight, part_NT[:, positions].flatten())
        found.append(losses.view(len(part_NT), -1).cpu().double().numpy())
    num_early = early[1] - early[0] + 1
    loss_NT, documents_N = np.concatenate(found), documents_N[is_full_N.numpy()]
    losses_2N = np.stack([loss_NT[:, :num_early].mean(1), loss_NT[:, num_early:].mean(1)])
    (score,), (error,) = clustered_means(losses_2N[1:] - losses_2N[:1], np.ones(len(loss_NT)), documents_N)
    return {
        "in_context_positions": ((early[0] + early[1]) // 2, (late[0] + late[1]) // 2),
        "in_context_bands": bands,
        "in_context_losses": losses_2N.mean(1),
        "in_context_score": np.array(score),
        "in_context_error": np.array(error),
        "in_context_windows": len(loss_NT),
        "in_context_documents": len(np.unique(documents_N)),
    }


def position_bands(context_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the first and last position of the early and the late band; a position is the number of tokens before."""
    early = max(1, context_size // 20), max(1, 3 * context_size // 20)
    return early, (max(2, 3 * context_size // 4), context_size)


SCORES = ("previous", "current", "first", "duplicate", "induction")
THRESHOLD = 0.4
"""The smallest score of a head with a role, a convention of the ARENA course."""
MARGIN = 0.1
"""The smallest difference of the score of a role from the uniform baseline."""
NUM_ERRORS = 2
"""The same, in standard errors."""
FEWEST = 5
"""The fewest tokens that the score of a role averages: fewer agree by chance."""


@dataclass(frozen=True, kw_only=True)
class HeadScores(Result):
    """What each head attends to and whether it copies.

    Attributes:
        tokens: (N, T) the ids that the model was given.
        layers, heads: (L,), (H,) the layers and the heads of each, counted from 0.
        score_names: (M,) `SCORES`.
        scores: (L, H, M) mean share of a head's attention; NaN if no token has such a source.
        uniform: (M,) the scores of uniform attention.
        errors: (L, H, M) standard errors of the scores less the uniform baseline: clustered by sequence, or of a single
            sequence over its tokens; NaN for fewer than two of them.
        num_destinations: (M,) the number of tokens, in all sequences, that a score averages.
        num_overlaps: (M,) tokens whose source t - 1 is left out, since a previous-token head attends there too.
        copying: (L, H) from -1 (suppresses what it sees) to 1 (copies it); NaN for a head that writes nothing.
        num_averaged: the number of tokens that `copying` is computed over.
        threshold: the score above which a head has a role.
        margin: the smallest difference of the score of a role from the uniform baseline.
        roles: (L, H) the names of the scores of at least `threshold`, over at least `FEWEST` tokens, and above the
            uniform baseline by at least `margin` and by more than `NUM_ERRORS` standard errors.
        losses: (T - 1,) mean loss of token 1, 2, ... of the sequences, in nats.
        repeat_gap: () mean loss of tokens 2 to S of the first copy minus their mean loss in the second, in nats; NaN
            if the tokens are not two copies. Token 1 is not predictable in the second copy, so it is left out.
        repeat_gap_error: () its standard error over the sequences.
        in_context_positions: the middle of the early and of the late band of positions; None without full windows.
        in_context_bands: the first and the last position of both bands.
        in_context_losses: (2,) mean loss there, in nats.
        in_context_score: () late minus early: negative where a longer context helps.
        in_context_error: () its standard error, clustered by document.
        in_context_windows, in_context_documents: how many windows, of how many documents.
        text_scores: (L, H, M) the scores at natural repeats of validation windows (`text_repeats`); without such
            windows, this and the next three fields are None.
        text_uniform: (M,) the scores of uniform attention there.
        text_repeats, text_documents: how many repeats, in how many documents.
        text_gap: () mean loss of a repeated token at its first occurrence minus that at its repetition, in nats.
        text_gap_error: () its standard error, clustered by document.
    """

    tokens: np.ndarray
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    score_names: tuple[str, ...]
    scores: np.ndarray
    uniform: np.ndarray
    errors: np.ndarray
    num_destinations: np.ndarray
    num_overlaps: np.ndarray
    copying: np.ndarray
    num_averaged: int
    threshold: float
    margin: float
    roles: tuple[tuple[tuple[str, ...], ...], ...]
    losses: np.ndarray
    repeat_gap: np.ndarray
    repeat_gap_error: np.ndarray
    in_context_positions: tuple[int, int] | None = None
    in_context_bands: tuple[tuple[int, int], tuple[int, int]] | None = None
    in_context_losses: np.ndarray = field(default_factory=lambda: np.full(2, np.nan))
    in_context_score: np.ndarray = field(default_factory=lambda: np.array(np.nan))
    in_context_error: np.ndarray = field(default_factory=lambda: np.array(np.nan))
    in_context_windows: int = 0
    in_context_documents: int = 0
    text_scores: np.ndarray | None = None
    text_uniform: np.ndarray | None = None
    text_repeats: int | None = None
    text_documents: int | None = None
    text_gap: np.ndarray = field(default_factory=lambda: np.array(np.nan))
    text_gap_error: np.ndarray = field(default_factory=lambda: np.array(np.nan))

    def places(self) -> Iterator[tuple[int, int, str]]:
        """Yield the row, the column and the name of each head, such as `L0H1`."""
        for row, layer in enumerate(self.layers):
            for column, head in enumerate(self.heads):
                yield row, column, f"L{layer}H{head}"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for row, column, _ in self.places():
            place, roles = {"layer": self.layers[row], "head": self.heads[column]}, self.roles[row][column]
            numbers = np.stack([self.scores[row, column], self.uniform, self.errors[row, column]], axis=1)
            for name, (value, uniform, error) in zip(self.score_names, numbers.tolist(), strict=True):
                role = name in roles
                yield {**place, "score": name, "value": value, "uniform": uniform, "error": error, "role": role}
            copying = float(self.copying[row, column])
            yield {**place, "score": "copying", "value": copying, "uniform": "", "error": "", "role": ""}


def score_heads(
    model: Transformer,
    tokens_NT: torch.Tensor,
    windows: TextWindows | None = None,
    averaged: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    threshold: float = THRESHOLD,
) -> HeadScores:
    """Score each head: the mean attention to a kind of source, over the tokens that have such a source.

    `previous` t - 1, `current` t, `first` 0, `duplicate` all earlier places of token t, `induction` all places just
    after those (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the prefix matching score of
    Olsson et al. 2022, "In-context Learning and Induction Heads"). The last two leave out t - 1, since a previous-token
    head attends there too (all of induction in a b a b). Position 0 attends only to itself and never counts. On
    `repeated_tokens` of length S these are t - S and t - S + 1, for the second copy only. The usual diagonal of the
    whole pattern has two entries too many: a perfect induction head scores 0.96, and a head that attends to the start
    token 0.04 (S = 25).

    Args:
        tokens_NT: (N, T) ids, at most `context_size` in a row.
        windows: real text, for the in-context-learning score and the scores at natural repeats; None: leave both out.
        averaged: the tokens that copying is computed over, such as those that occur in training (None: all).
        layers, heads: which layers, and which heads of each (None: all).
        threshold: the score above which a head has a role, if it is clearly above the uniform baseline too.
    """
    layers, heads = selected(layers, model.num_layers), selected(heads, model.num_heads)

    def observations(values_NT: np.ndarray) -> np.ndarray:
        """Return a value for each observation: each of several sequences, or each token of a single one."""
        return values_NT.sum(1) if len(tokens_NT) > 1 else values_NT[0]

    shares, expected, counts, losses, row_error = [], [], [], [], 0.0
    num_overlaps = np.zeros(len(SCORES), dtype=int)
    for part, patterns, loss_BT in passes(model, tokens_NT, tokens_NT[:, 1:], layers, heads):
        sources, overlaps = source_masks(tokens_NT[part])
        num_overlaps = num_overlaps + overlaps.sum((0, 2)).numpy()
        num_sources_NTM = sources.sum(-1).transpose(1, 2).numpy()
        shares.append(observations(attended(patterns, sources, "ntlhm").numpy()))
        expected.append(observations(num_sources_NTM / np.arange(1, tokens_NT.shape[1] + 1)[:, None]))
        counts.append(observations(num_sources_NTM > 0))
        losses.append(loss_BT.numpy())
        row_error = float(np.maximum(row_error, (patterns.sum(-1) - 1).abs().max().item()))
    shares_CLHM, expected_CM, counts_CM = map(np.concatenate, (shares, expected, counts))
    num_destinations = counts_CM.sum(0)
    with np.errstate(invalid="ignore"):
        scores, uniform = shares_CLHM.sum(0) / num_destinations, expected_CM.sum(0) / num_destinations
    errors = clustered_errors(shares_CLHM - expected_CM[:, None, None], counts_CM)
    loss_NT = np.concatenate(losses)
    averaged = selected(averaged, model.vocab_size)
    copying, trace_error = copying_scores(model, averaged)
    text, text_receipts = ({}, ()) if windows is None else text_repeats(model, windows, layers, heads)
    return HeadScores(
        tokens=tokens_NT.cpu().numpy(),
        layers=layers,
        heads=heads,
        score_names=SCORES,
        scores=scores,
        uniform=uniform,
        errors=errors,
        num_destinations=num_destinations,
        num_overlaps=num_overlaps,
        copying=copying[np.ix_(layers, heads)],
        num_averaged=len(averaged),
        threshold=threshold,
        margin=MARGIN,
        roles=roles_of(scores, uniform, errors, num_destinations, threshold),
        losses=loss_NT.mean(0),
        **repeat_gap(tokens_NT, loss_NT),
        **({} if windows is None else in_context_learning(model, windows)),
        **text,
        receipts=(
            Receipt("rows sum to 1", row_error, rounding(model)),
            Receipt("scores are shares", outside_unit(scores), rounding(model)),
            Receipt("OV eigenvalues add up to the trace", trace_error, 1e-8),
            *text_receipts,
        ),
    )


def passes(
    model: Transformer, tokens_NT: torch.Tensor, targets_NT: torch.Tensor, layers: Sequence[int], heads: Sequence[int]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield the sequences of each forward pass, their patterns, (B, L, H, T, S), and their losses in float64."""
    size = max(1, TOKENS_AT_ONCE // tokens_NT.shape[1])
    device = model.token_embedding.weight.device
    for first in range(0, len(tokens_NT), size):
        part = slice(first, first + size)
        with torch.inference_mode():
            output = model(tokens_NT[part].to(device))
            logits = output.logits[:, : targets_NT.shape[1]]
            # Not log_softmax, which would write all logits again for the few that are needed.
            chosen = logits.gather(-1, targets_NT[part, :, None].to(device))[..., 0]
            losses = (logits.logsumexp(-1) - chosen).cpu().double()
            patterns = output.attention_weights[:, list(layers)][:, :, list(heads)]
        yield part, patterns, losses


def attended(patterns: torch.Tensor, sources_NMTS: torch.Tensor, axes: str) -> torch.Tensor:
    """Sum the attention to the sources of each score, in float64 on the CPU."""
    with torch.inference_mode():
        masks = sources_NMTS.to(patterns.device, patterns.dtype)
        return torch.einsum(f"nlhts,nmts->{axes}", patterns, masks).cpu().double()


def clustered_errors(excess_CLHM: np.ndarray, counts_CM: np.ndarray) -> np.ndarray:
    """Return the standard error of a ratio of sums over clusters, (L, H, M); NaN for fewer than two clusters."""
    num_clusters, totals = (counts_CM > 0).sum(0), counts_CM.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        residuals_CLHM = excess_CLHM - excess_CLHM.sum(0) / totals * counts_CM[:, None, None]
        variance = np.square(residuals_CLHM).sum(0) * num_clusters / (num_clusters - 1)
        return np.where(num_clusters > 1, np.sqrt(variance) / totals, np.nan)


def roles_of(
    scores: np.ndarray, uniform: np.ndarray, errors: np.ndarray, num_destinations: np.ndarray, threshold: float
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Return for each head the names of its scores that are high and clearly above the uniform baseline."""
    is_clear = (scores - uniform >= MARGIN) & (scores - uniform > NUM_ERRORS * errors)
    above = (scores >= threshold) & is_clear & (num_destinations >= FEWEST)
    return tuple(tuple(tuple(np.array(SCORES)[head].tolist()) for head in layer) for layer in above)


def source_masks(tokens_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether source s counts for score m at t, (N, M, T, S), and whether t - 1 is left out, (N, M, T)."""
    s_S = torch.arange(tokens_NT.shape[1])
    t_T1 = s_S[:, None]
    same_NTS = tokens_NT[:, :, None] == tokens_NT[:, None, :]
    # Source s follows a token that is equal to token t: the column before, moved by one.
    follows_NTS = torch.cat([torch.zeros_like(same_NTS[..., :1]), same_NTS[..., :-1]], dim=-1)
    fixed = [(s_S == t_T1 - 1), (s_S == t_T1) & (t_T1 > 0), (s_S == 0) & (t_T1 > 0)]
    masks = [mask_TS.expand_as(same_NTS) for mask_TS in fixed]
    looked_for = torch.stack([*masks, same_NTS & (s_S < t_T1), follows_NTS & (s_S < t_T1)], dim=1)
    is_copy_M11 = torch.tensor([name in ("duplicate", "induction") for name in SCORES])[:, None, None]
    left_out = looked_for & is_copy_M11 & (s_S == t_T1 - 1)
    return looked_for & ~left_out, left_out.any(-1)


def copying_scores(model: Transformer, averaged: Sequence[int]) -> tuple[np.ndarray, float]:
    """Return sum Re(lambda) / sum |lambda| over the eigenvalues of each OV circuit, (L, H), and a receipt's error.

    The circuit W_E W_V W_O W_U, with the norms' gains in W_V and W_U, is how much more probable each token becomes by
    being attended to (Elhage et al. 2021, "Copying / primitive in-context learning"). It is (Vocab, Vocab), restricted
    to the tokens in `averaged`, and of rank at most V. AB and BA have the same nonzero eigenvalues, so those of the
    (V, V) matrix W_O (W_U W_E) W_V are computed; all heads share the (E, E) product in the middle. The check is the
    trace of W_U W_E W_V W_O: its error relative to sum |lambda|, the largest of all heads.
    """
    embedding = float64(model.token_embedding.weight)[list(averaged)]
    unembedding = float64(model.final_norm.folded(model.unembedding.detach().cpu().double()[list(averaged)])[0])
    between, read_by, written_by = unembedding.T @ embedding, embedding.T @ embedding, unembedding.T @ unembedding
    scores, errors = np.full((model.num_layers, model.num_heads), np.nan), [0.0]
    for layer, block in enumerate(model.blocks):
        value_HVE = block.attention_norm.folded(block.attention.value.weight.detach().cpu().double())[0].unflatten(
            0, (-1, model.d_value)
        )
        values = float64(block.attention.per_head(value_HVE, dim=0))
        outputs = float64(block.attention.output.weight).T.reshape(values.shape)
        circuits = outputs @ between @ values.transpose(0, 2, 1)
        if not np.isfinite(circuits).all():
            return scores, float("nan")
        for head, eigenvalues in enumerate(np.linalg.eigvals(circuits)):
            value, output = values[head], outputs[head]
            total = np.abs(eigenvalues).sum()
            # Norms of W_E W_V and W_O W_U.
            size = np.sqrt(np.vdot(value, value @ read_by) * np.vdot(output, output @ written_by))
            if total > 1e-7 * size:  # below, rounding alone makes such eigenvalues
                scores[layer, head] = eigenvalues.real.sum() / total
                errors.append(abs(eigenvalues.sum() - np.vdot(between, output.T @ value)) / total)
    return scores, float(max(errors))


def repeat_gap(tokens_NT: torch.Tensor, loss_NT: np.ndarray) -> dict[str, np.ndarray]:
    """Return the repeat gap and its standard error; `loss_NT[:, t]` is the loss of token t + 1."""
    length, num_start = divmod(tokens_NT.shape[1], 2)
    middle = num_start + length
    if length < 2 or not torch.equal(tokens_NT[:, num_start:middle], tokens_NT[:, middle:]):
        return {"repeat_gap": np.array(np.nan), "repeat_gap_error": np.array(np.nan)}
    second = first_copied(length, num_start) - 1
    gap_N = loss_NT[:, num_start : middle - 1].mean(1) - loss_NT[:, second:].mean(1)
    return {"repeat_gap": np.array(gap_N.mean()), "repeat_gap_error": np.array(standard_error(gap_N))}


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of independent values; NaN for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


MOST_TEXT_TOKENS = 2**15
RARE = 0.02
"""The largest share of the documents that a rare pair occurs in; a pair of a single document is always rare."""


def text_repeats(
    model: Transformer, text: TextWindows, layers: Sequence[int], heads: Sequence[int]
) -> tuple[dict[str, Any], tuple[Receipt, ...]]:
    """Return the scores at natural repeats, the fields `text_...` of `HeadScores`, and a receipt.

    The sources are those of `score_heads`, but the mean is only over destinations at which a natural repeat starts:
    tokens t and t + 1 occurred before, one after the other, so that copying what came next is right. `text_gap` is the
    mean, over these repeats, of the loss of token t + 1 where the pair first occurred in the window, minus its loss
    here. A model that reads only the current token has a gap of exactly 0, since it predicts the same at both places.

    Of more than `MOST_TEXT_TOKENS` tokens, every second, third, ... window is read, since attention patterns take
    longer than losses.
    """
    every = -(-text.tokens.numel() // MOST_TEXT_TOKENS)
    text = TextWindows(text.tokens[::every], text.documents[::every], text.special_ids)
    documents_N, firsts_NC = text.documents, first_occurrences(text)
    windows_NT = text.tokens.where(text.tokens != IGNORED, PADDING)
    tokens_NT = windows_NT[:, :-1]
    totals, uniform, counts, row_error, gaps = 0.0, np.zeros(len(SCORES)), np.zeros(len(SCORES)), 0.0, []
    for part, patterns, loss_BT in passes(model, tokens_NT, windows_NT[:, 1:], layers, heads):
        firsts_BC = firsts_NC[part]
        is_repeat_BT = firsts_BC >= 0
        sources = source_masks(tokens_NT[part])[0] & is_repeat_BT[:, None, :, None]
        totals += attended(patterns, sources, "lhm").numpy()
        num_sources_BMT = sources.sum(-1).numpy()
        uniform += (num_sources_BMT / np.arange(1, tokens_NT.shape[1] + 1)).sum((0, 2))
        counts += (num_sources_BMT > 0).sum((0, 2))
        gaps.append((loss_BT.gather(1, firsts_BC.clamp(min=0)) - loss_BT).where(is_repeat_BT, 0.0).sum(1).numpy())
        row_error = float(np.maximum(row_error, (patterns.sum(-1) - 1).abs().max().item()))
    repeats_N = (firsts_NC >= 0).sum(1).numpy()
    found = repeats_N > 0
    gap = error = np.full(1, np.nan)
    if found.any():
        gap, error = clustered_means(np.concatenate(gaps)[None, found], repeats_N[found], documents_N[found])
    with np.errstate(invalid="ignore"):
        fields = {
            "text_scores": totals / counts,
            "text_uniform": uniform / counts,
            "text_repeats": int(repeats_N.sum()),
            "text_documents": len(np.unique(documents_N[found])),
            "text_gap": np.array(gap[0]),
            "text_gap_error": np.array(error[0]),
        }
    return fields, (Receipt("rows sum to 1 on text", row_error, rounding(model)),)


def first_occurrences(text: TextWindows) -> torch.Tensor:
    """Return where the natural repeat at each position first occurred in the window, (N, C); -1 if there is none."""
    # Padding gets the next free id, so that equal numbers are equal pairs.
    size = int(text.tokens.max()) + 2
    ids_NT = text.tokens.where(text.tokens != IGNORED, size - 1)
    pairs_NC = ids_NT[:, :-1] * size + ids_NT[:, 1:]
    is_text_NT = ~torch.isin(ids_NT, torch.tensor([*text.special_ids, size - 1]))
    is_text_NC = is_text_NT[:, :-1] & is_text_NT[:, 1:]
    same_NCC = (pairs_NC[:, :, None] == pairs_NC[:, None, :]).tril(diagonal=-1)
    has_earlier_NC = same_NCC.any(-1) & is_text_NC & torch.from_numpy(rare_pairs(pairs_NC.numpy(), text.documents))
    # `argmax` returns the first of equal values.
    return same_NCC.byte().argmax(-1).where(has_earlier_NC, -1)


def rare_pairs(pairs_NC: np.ndarray, documents_N: np.ndarray) -> np.ndarray:
    """Return whether each pair occurs in few of the documents, (N, C)."""
    numbers, pairs = np.unique(pairs_NC, return_inverse=True)
    names, documents = np.unique(documents_N, return_inverse=True)
    occurrences = np.unique(documents[:, None] * len(numbers) + pairs.reshape(pairs_NC.shape))
    frequencies = np.bincount(occurrences % len(numbers), minlength=len(numbers))
    return (frequencies <= max(1, int(RARE * len(names))))[pairs].reshape(pairs_NC.shape)
