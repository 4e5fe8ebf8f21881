"""What each head is for: scores by exact masks, copying from the weights, and what the model gains by looking back.

Shapes: N sequence, T position (destination), S position (source), L layer, H head, M score, E embedding_size,
V d_value, Vocab vocab_size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.components.linear_cross_entropy import linear_cross_entropy_losses
from lumiere.interpret.result import Receipt, Result, rounding
from lumiere.models.transformer import Transformer

SCORES = ("previous", "current", "first", "duplicate", "induction")
THRESHOLD = 0.4
"""The share above which a head has a role, that of the ARENA course; any such line is a convention."""
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
        num_destinations: (M,) tokens, of all sequences together, over which a score is a mean.
        copying: (L, H) from -1 (suppresses what it sees) to 1 (copies it); NaN for a head that writes nothing.
        threshold: the score above which a head has a role.
        roles: (L, H) the names of the scores above the threshold and above the uniform baseline.
        losses: (T - 1,) mean loss, in nats, of predicting token 1, 2, ... of the sequences.
        repeat_gap: () mean loss of tokens 2 to S of the first copy minus that of the same in the second, in nats; NaN
            where the tokens are not two copies. Token 1 is left out: nothing tells that the second copy begins.
        repeat_gap_error: () its standard error over the sequences.
        in_context_positions: the early and the late position, or None where there is no text for it.
        in_context_losses: (2,) mean loss there, in nats.
        in_context_score: () late minus early: negative where a longer context helps.
        in_context_error: () its standard error over the windows.
    """

    tokens: np.ndarray
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    score_names: tuple[str, ...]
    scores: np.ndarray
    uniform: np.ndarray
    num_destinations: np.ndarray
    copying: np.ndarray
    threshold: float
    roles: tuple[tuple[tuple[str, ...], ...], ...]
    losses: np.ndarray
    repeat_gap: np.ndarray
    repeat_gap_error: np.ndarray
    in_context_positions: tuple[int, int] | None
    in_context_losses: np.ndarray
    in_context_score: np.ndarray
    in_context_error: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for row, column in np.ndindex(len(self.layers), len(self.heads)):
            place = {"layer": self.layers[row], "head": self.heads[column]}
            for number, name in enumerate(self.score_names):
                score, uniform = float(self.scores[row, column, number]), float(self.uniform[number])
                role = name in self.roles[row][column]
                yield {**place, "score": name, "value": score, "uniform": uniform, "role": role}
            yield {**place, "score": "copying", "value": float(self.copying[row, column]), "uniform": "", "role": ""}


def head_scores(
    model: Transformer,
    tokens_NT: torch.Tensor,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    threshold: float = THRESHOLD,
    windows_NT: torch.Tensor | None = None,
) -> HeadScores:
    """Each head's scores: the mean, over the tokens that have such a source, of the attention that goes there.

    `previous` t - 1, `current` t, `first` 0, `duplicate` all earlier places of token t, `induction` all places just
    after those (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the prefix matching score of
    Olsson et al. 2022, "In-context Learning and Induction Heads"). Position 0 has only itself and never counts. On
    `repeated_tokens` of length S these are t - S and t - S + 1, for the second copy alone. Others take a diagonal of
    the whole pattern, which has two entries too many: a perfect induction head then has 0.96, and one that looks at
    the start token 0.04 (S = 25).

    Args:
        model: in evaluation mode.
        tokens_NT: (N, T) ids, at most `context_size` in a row.
        layers: which layers (None: all).
        heads: which heads of each (None: all).
        threshold: the score above which a head has a role, if it is above the uniform baseline too.
        windows_NT: (N, context_size + 1) ids of real text, for the in-context-learning score; None: leave it out.
    """
    layers = range(model.num_layers) if layers is None else layers
    heads = range(model.num_heads) if heads is None else heads
    device = next(model.parameters()).device
    totals, uniform, counts, losses, row_error = 0.0, np.zeros(len(SCORES)), np.zeros(len(SCORES)), [], 0.0
    for part_NT in tokens_NT.split(max(1, TOKENS_AT_ONCE // tokens_NT.shape[1])):
        sources = source_masks(part_NT).to(device)
        with torch.inference_mode():
            output = model(part_NT.to(device))
            patterns = output.attention_weights[:, list(layers)][:, :, list(heads)]
            totals += torch.einsum("nlhts,nmts->lhm", patterns, sources.to(patterns.dtype)).cpu().double().numpy()
            # Not log_softmax, which would write all logits again for the few that are wanted.
            chosen = output.logits[:, :-1].gather(-1, part_NT[:, 1:, None].to(device))[..., 0]
            losses.append((output.logits[:, :-1].logsumexp(-1) - chosen).cpu().double().numpy())
            row_error = max(row_error, (patterns.sum(-1) - 1).abs().max().item())
        num_sources_NMT = sources.sum(-1).cpu().numpy()
        uniform += (num_sources_NMT / np.arange(1, part_NT.shape[1] + 1)).sum((0, 2))
        counts += (num_sources_NMT > 0).sum((0, 2))
    with np.errstate(invalid="ignore"):
        scores, uniform = totals / counts, uniform / counts
    loss_NT = np.concatenate(losses)
    copying, trace_error = copying_scores(model)
    return HeadScores(
        tokens=tokens_NT.cpu().numpy(),
        layers=tuple(layers),
        heads=tuple(heads),
        score_names=SCORES,
        scores=scores,
        uniform=uniform,
        num_destinations=counts.astype(int),
        copying=copying[np.ix_(layers, heads)],
        threshold=threshold,
        roles=roles_of(scores, uniform, threshold),
        losses=loss_NT.mean(0),
        **repeat_gap(tokens_NT, loss_NT),
        **in_context_learning(model, windows_NT),
        receipts=(
            Receipt("rows sum to 1", row_error, rounding(model)),
            Receipt("scores are shares", float(np.nanmax(np.abs(scores - 0.5), initial=0.5) - 0.5), rounding(model)),
            Receipt("OV eigenvalues add up to the trace", trace_error, 1e-8),
        ),
    )


def roles_of(scores: np.ndarray, uniform: np.ndarray, threshold: float) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """For each head the names of its scores above both the threshold and the uniform baseline."""
    above = (scores >= threshold) & (scores > uniform)
    return tuple(tuple(tuple(np.array(SCORES)[head].tolist()) for head in layer) for layer in above)


def source_masks(tokens_NT: torch.Tensor) -> torch.Tensor:
    """(N, M, T, S), true where source s is what score m looks for from position t."""
    num_positions = tokens_NT.shape[1]
    t_T1, s_S = torch.arange(num_positions)[:, None], torch.arange(num_positions)
    same_NTS = tokens_NT[:, :, None] == tokens_NT[:, None, :]
    # Source s follows a token that is equal to token t: the column before, moved by one.
    follows_NTS = torch.cat([torch.zeros_like(same_NTS[..., :1]), same_NTS[..., :-1]], dim=-1)
    earlier_TS = (s_S < t_T1) & (t_T1 > 0)
    fixed = [(s_S == t_T1 - 1), (s_S == t_T1) & (t_T1 > 0), (s_S == 0) & (t_T1 > 0)]
    masks = [mask_TS.expand_as(same_NTS) for mask_TS in fixed]
    return torch.stack([*masks, same_NTS & earlier_TS, follows_NTS & earlier_TS], dim=1)


def copying_scores(model: Transformer) -> tuple[np.ndarray, float]:
    """sum Re(lambda) / sum |lambda| over the eigenvalues of each head's OV circuit, (L, H), and a receipt's error.

    The circuit W_E W_V W_O W_U, with the norms' gains in W_V and W_U, says how much more likely each token becomes by
    being looked at (Elhage et al. 2021, "Copying / primitive in-context learning"); (Vocab, Vocab) and of rank V at
    most. AB and BA have the same eigenvalues but for zeros, so those of (W_O W_U)(W_E W_V), (V, V), are taken. Its
    trace, summed over the vocabulary, is the independent check: relative to sum |lambda|, the largest of all heads.
    """
    embedding = model.token_embedding.weight.detach().cpu().double().numpy()
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
    gap_N = loss_NT[:, 1:length].mean(1) - loss_NT[:, length + 1 :].mean(1)
    return {"repeat_gap": np.array(gap_N.mean()), "repeat_gap_error": np.array(standard_error(gap_N))}


def in_context_learning(model: Transformer, windows_NT: torch.Tensor | None) -> dict[str, Any]:
    """Loss at a late minus loss at an early position of real text, and its standard error over the windows.

    Olsson et al. 2022 take the tokens 500 and 50 of a context of 512. Here they are the tokens 3/4 and 1/10 of the
    context in, so that contexts of all lengths have one; scores of different lengths do not compare.
    """
    if windows_NT is None:
        missing = np.array(np.nan)
        names = ("in_context_score", "in_context_error")
        return {"in_context_positions": None, "in_context_losses": np.full(2, np.nan), **dict.fromkeys(names, missing)}
    positions = early, late = (max(1, model.context_size // 10), 3 * model.context_size // 4)
    weight, found = model.token_embedding.weight, []
    for part_NT in windows_NT.split(max(1, TOKENS_AT_ONCE // (late + 1))):
        part_NT = part_NT.to(weight.device)
        with torch.inference_mode():
            # The loss at a position is that of predicting the token there from those before.
            residual = model.final_residual(part_NT[:, :late])[:, [early - 1, late - 1]]
            targets = part_NT[:, [early, late]]
            losses = linear_cross_entropy_losses(residual.flatten(0, 1), weight, targets.flatten())
        found.append(losses.view(-1, 2).cpu().double().numpy())
    loss_N2 = np.concatenate(found)
    score_N = loss_N2[:, 1] - loss_N2[:, 0]
    return {
        "in_context_positions": positions,
        "in_context_losses": loss_N2.mean(0),
        "in_context_score": np.array(score_N.mean()),
        "in_context_error": np.array(standard_error(score_N)),
    }


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; NaN of a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
