"""What each head is for: scores by exact masks, copying from the weights, and what the model gains by looking back.

Shapes: N sequence, T position (destination), S position (source), L layer, H head, M score, E embedding_size,
V d_value, C cluster (a sequence, or a token of a single one), Vocab vocab_size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.interpret.in_context import in_context_learning
from lumiere.interpret.repeats import first_copied
from lumiere.interpret.result import Receipt, Result, rounding
from lumiere.models.transformer import Transformer

SCORES = ("previous", "current", "first", "duplicate", "induction")
THRESHOLD = 0.4
"""The share above which a head has a role, that of the ARENA course; any such line is a convention."""
MARGIN = 0.1
"""How far above the uniform baseline the score of a role has to be."""
NUM_ERRORS = 2
"""By how many standard errors it has to be above it."""
FEWEST = 5
"""Tokens over which the score of a role has to be a mean: fewer agree by chance."""
TOKENS_AT_ONCE = 4096
"""Tokens of a forward pass, so that long contexts do not take all memory."""


@dataclass(frozen=True, kw_only=True)
class HeadScores(Result):
    """What each head looks at and whether it copies.

    Attributes:
        tokens: (N, T) the ids that the model was given.
        layers: (L,) the layers, counted from 0.
        heads: (H,) the heads of each layer, counted from 0.
        score_names: (M,) `SCORES`.
        scores: (L, H, M) mean share of a head's attention; NaN where no token has such a source.
        uniform: (M,) what a head that looks at all tokens alike scores.
        errors: (L, H, M) standard errors of the scores less the uniform baseline: clustered by sequence, or of a single
            sequence over its tokens; NaN where there are fewer than two of them.
        num_destinations: (M,) tokens, of all sequences together, over which a score is a mean.
        num_overlaps: (M,) tokens whose source t - 1 is left out, since a previous-token head looks there too.
        copying: (L, H) from -1 (suppresses what it sees) to 1 (copies it); NaN for a head that writes nothing.
        num_averaged: the number of tokens that `copying` is computed over.
        threshold: the score above which a head has a role.
        margin: how far above the uniform baseline the score of a role has to be.
        roles: (L, H) the names of the scores of at least `threshold`, over at least `FEWEST` tokens, and above the
            uniform baseline by at least `margin` and by more than `NUM_ERRORS` standard errors.
        losses: (T - 1,) mean loss, in nats, of predicting token 1, 2, ... of the sequences.
        repeat_gap: () mean loss of tokens 2 to S of the first copy minus that of the same in the second, in nats; NaN
            where the tokens are not two copies. Token 1 is left out: nothing tells that the second copy begins.
        repeat_gap_error: () its standard error over the sequences.
        in_context_positions: the middle of the early and of the late band of positions; None without a text, or where
            the context has no two.
        in_context_bands: the first and the last position of both bands.
        in_context_losses: (2,) mean loss there, in nats.
        in_context_score: () late minus early: negative where a longer context helps.
        in_context_error: () its standard error, clustered by document.
        in_context_windows, in_context_documents: how many windows, of how many documents.
        text_scores: (L, H, M) the scores at natural repeats of validation windows (`add_text_repeats`); these fields
            are None without such windows.
        text_uniform: (M,) what a head that looks at all tokens alike scores there.
        text_repeats, text_documents: how many repeats, in how many documents.
        text_gap: () mean loss of a repeated token where it first came, minus that where it comes again, in nats.
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
    in_context_positions: tuple[int, int] | None
    in_context_bands: tuple[tuple[int, int], tuple[int, int]] | None
    in_context_losses: np.ndarray
    in_context_score: np.ndarray
    in_context_error: np.ndarray
    in_context_windows: int
    in_context_documents: int
    text_scores: np.ndarray | None = None
    text_uniform: np.ndarray | None = None
    text_repeats: int | None = None
    text_documents: int | None = None
    text_gap: np.ndarray | None = None
    text_gap_error: np.ndarray | None = None

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for row, column in np.ndindex(len(self.layers), len(self.heads)):
            place = {"layer": self.layers[row], "head": self.heads[column]}
            for number, name in enumerate(self.score_names):
                score, uniform = float(self.scores[row, column, number]), float(self.uniform[number])
                error, role = float(self.errors[row, column, number]), name in self.roles[row][column]
                yield {**place, "score": name, "value": score, "uniform": uniform, "error": error, "role": role}
            copying = float(self.copying[row, column])
            yield {**place, "score": "copying", "value": copying, "uniform": "", "error": "", "role": ""}


def head_scores(
    model: Transformer,
    tokens_NT: torch.Tensor,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    threshold: float = THRESHOLD,
    windows_NT: torch.Tensor | None = None,
    documents_N: np.ndarray | None = None,
    averaged: Sequence[int] | None = None,
) -> HeadScores:
    """Each head's scores: the mean, over the tokens that have such a source, of the attention that goes there.

    `previous` t - 1, `current` t, `first` 0, `duplicate` all earlier places of token t, `induction` all places just
    after those (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the prefix matching score of
    Olsson et al. 2022, "In-context Learning and Induction Heads"). The last two leave out t - 1, since a previous-token
    head looks there too: all of induction in a b a b. Position 0 has only itself and never counts. On
    `repeated_tokens` of length S these are t - S and t - S + 1, for the second copy alone. Others take a diagonal of
    the whole pattern, which has two entries too many: a perfect induction head then has 0.96, and one that looks at
    the start token 0.04 (S = 25).

    Args:
        model: in evaluation mode.
        tokens_NT: (N, T) ids, at most `context_size` in a row.
        layers: which layers (None: all).
        heads: which heads of each (None: all).
        threshold: the score above which a head has a role, if it is clearly above the uniform baseline too.
        windows_NT: (N, context_size + 1) ids of real text, for the in-context-learning score; None: leave it out.
        documents_N: which document each window is cut from; None: each from one of its own.
        averaged: the tokens that copying is computed over, such as those that occur in training (None: all).
    """
    layers = range(model.num_layers) if layers is None else layers
    heads = range(model.num_heads) if heads is None else heads
    device, is_many = next(model.parameters()).device, len(tokens_NT) > 1
    shares, expected, counts, losses, row_error = [], [], [], [], 0.0
    num_overlaps = np.zeros(len(SCORES), dtype=int)
    for part_NT in tokens_NT.split(max(1, TOKENS_AT_ONCE // tokens_NT.shape[1])):
        sources, overlaps = source_masks(part_NT)
        sources, num_overlaps = sources.to(device), num_overlaps + overlaps.sum((0, 2)).numpy()
        with torch.inference_mode():
            output = model(part_NT.to(device))
            patterns = output.attention_weights[:, list(layers)][:, :, list(heads)]
            shares_NTLHM = torch.einsum("nlhts,nmts->ntlhm", patterns, sources.to(patterns.dtype)).cpu().double()
            # A sequence is one observation, a single text as many as it has tokens.
            shares.append(shares_NTLHM.sum(1).numpy() if is_many else shares_NTLHM[0].numpy())
            # Not log_softmax, which would write all logits again for the few that are wanted.
            chosen = output.logits[:, :-1].gather(-1, part_NT[:, 1:, None].to(device))[..., 0]
            losses.append((output.logits[:, :-1].logsumexp(-1) - chosen).cpu().double().numpy())
            row_error = max(row_error, (patterns.sum(-1) - 1).abs().max().item())
        num_sources_NTM = sources.sum(-1).transpose(1, 2).cpu().numpy()
        expected_NTM = num_sources_NTM / np.arange(1, part_NT.shape[1] + 1)[:, None]
        expected.append(expected_NTM.sum(1) if is_many else expected_NTM[0])
        counts.append((num_sources_NTM > 0).sum(1) if is_many else num_sources_NTM[0] > 0)
    shares_CLHM, expected_CM, counts_CM = map(np.concatenate, (shares, expected, counts))
    num_destinations = counts_CM.sum(0)
    with np.errstate(invalid="ignore"):
        scores, uniform = shares_CLHM.sum(0) / num_destinations, expected_CM.sum(0) / num_destinations
    errors = clustered_errors(shares_CLHM - expected_CM[:, None, None], counts_CM)
    loss_NT = np.concatenate(losses)
    averaged = range(model.vocab_size) if averaged is None else averaged
    copying, trace_error = copying_scores(model, averaged)
    return HeadScores(
        tokens=tokens_NT.cpu().numpy(),
        layers=tuple(layers),
        heads=tuple(heads),
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
        **in_context_learning(model, windows_NT, documents_N),
        receipts=(
            Receipt("rows sum to 1", row_error, rounding(model)),
            Receipt("scores are shares", float(np.nanmax(np.abs(scores - 0.5), initial=0.5) - 0.5), rounding(model)),
            Receipt("OV eigenvalues add up to the trace", trace_error, 1e-8),
        ),
    )


def clustered_errors(excess_CLHM: np.ndarray, counts_CM: np.ndarray) -> np.ndarray:
    """(L, H, M) the standard error of the ratio of sums and counts over clusters; NaN of fewer than two."""
    num_clusters, totals = (counts_CM > 0).sum(0), counts_CM.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        residuals_CLHM = excess_CLHM - excess_CLHM.sum(0) / totals * counts_CM[:, None, None]
        variance = np.square(residuals_CLHM).sum(0) * num_clusters / (num_clusters - 1)
        return np.where(num_clusters > 1, np.sqrt(variance) / totals, np.nan)


def roles_of(
    scores: np.ndarray, uniform: np.ndarray, errors: np.ndarray, num_destinations: np.ndarray, threshold: float
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """For each head the names of its scores that are high and clearly above the uniform baseline."""
    is_clear = (scores - uniform >= MARGIN) & (scores - uniform > NUM_ERRORS * errors)
    above = (scores >= threshold) & is_clear & (num_destinations >= FEWEST)
    return tuple(tuple(tuple(np.array(SCORES)[head].tolist()) for head in layer) for layer in above)


def source_masks(tokens_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, M, T, S), true where source s is what score m looks for from position t.

    And (N, M, T), true where t - 1 would have been such a source too, and is left out.
    """
    num_positions = tokens_NT.shape[1]
    t_T1, s_S = torch.arange(num_positions)[:, None], torch.arange(num_positions)
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
    """sum Re(lambda) / sum |lambda| over the eigenvalues of each head's OV circuit, (L, H), and a receipt's error.

    The circuit W_E W_V W_O W_U, with the norms' gains in W_V and W_U, says how much more likely each token becomes by
    being looked at (Elhage et al. 2021, "Copying / primitive in-context learning"); (Vocab, Vocab) and of rank V at
    most, with the rows and columns of the tokens in `averaged` only. AB and BA have the same eigenvalues but for zeros,
    so those of (W_O W_U)(W_E W_V), (V, V), are taken. Its trace, summed over these tokens, is the independent check:
    relative to sum |lambda|, the largest of all heads.
    """
    embedding = model.token_embedding.weight.detach().cpu().double().numpy()[list(averaged)]
    unembedding = embedding * model.final_norm.weight.detach().cpu().double().numpy()
    scores, errors = np.full((model.num_layers, model.num_heads), np.nan), [0.0]
    for layer, block in enumerate(model.blocks):
        gain = block.attention_norm.weight.detach().cpu().double().numpy()
        value = block.attention.value.weight.detach().cpu().double().numpy() * gain
        output = block.attention.output.weight.detach().cpu().double().numpy()
        read = (embedding @ value.T).reshape(len(embedding), model.num_heads, -1)
        written = (unembedding @ output).reshape(len(embedding), model.num_heads, -1)
        traces = np.einsum("whv,whv->h", read, written)
        circuits = np.einsum("whu,whv->huv", written, read, optimize=True)
        for head, eigenvalues in enumerate(np.linalg.eigvals(circuits)):
            total = np.abs(eigenvalues).sum()
            size = np.linalg.norm(read[:, head]) * np.linalg.norm(written[:, head])
            if total > 1e-7 * size:  # below, rounding alone makes such eigenvalues
                scores[layer, head] = eigenvalues.real.sum() / total
                errors.append(abs(eigenvalues.sum() - traces[head]) / total)
    return scores, float(max(errors))


def repeat_gap(tokens_NT: torch.Tensor, loss_NT: np.ndarray) -> dict[str, np.ndarray]:
    """The gap and its standard error; `loss_NT[:, t]` is that of predicting token t + 1."""
    length, odd = divmod(tokens_NT.shape[1] - 1, 2)
    if odd or length < 2 or not torch.equal(tokens_NT[:, 1 : length + 1], tokens_NT[:, length + 1 :]):
        return {"repeat_gap": np.array(np.nan), "repeat_gap_error": np.array(np.nan)}
    gap_N = loss_NT[:, 1:length].mean(1) - loss_NT[:, first_copied(length) - 1 :].mean(1)
    return {"repeat_gap": np.array(gap_N.mean()), "repeat_gap_error": np.array(standard_error(gap_N))}


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; NaN of a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
