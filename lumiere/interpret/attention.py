"""Attention patterns of each head, optionally weighted by what is read, and the heads of a layer combined.

A weight says where information is read from, not what it does there (Jain & Wallace 2019, "Attention is not
Explanation"; Wiegreffe & Pinter 2019, "Attention is not not Explanation").

Shapes: L layer, H head, T position (destination), S position (source), V d_value, E embedding_size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.errors import check_choice
from lumiere.interpret.result import Receipt, Result, one_sequence, rounding, selected, table
from lumiere.models.transformer import Transformer

WEIGHTED = ("pattern", "value-weighted", "norm-weighted")
COMBINED = ("mean", "max", "rollout")


@dataclass(frozen=True, kw_only=True)
class Attention(Result):
    """What the results of both functions have in common.

    Attributes:
        tokens: (T,) the ids that the model was given.
        kind: one of `WEIGHTED` or `COMBINED`.
        layers, heads: (L,), (H,) the layers and the heads of each, counted from 0; for `COMBINED`, the combined heads.
    """

    tokens: tuple[int, ...]
    kind: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]

    def weight_rows(self, axes: Mapping[str, Sequence[int]], **columns: np.ndarray) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of weights, without those of later sources."""
        positions = range(len(self.tokens))
        rows = table({**axes, "destination": positions, "source": positions}, **columns)
        return (row for row in rows if row["source"] <= row["destination"])


@dataclass(frozen=True, kw_only=True)
class AttentionPatterns(Attention):
    """The attention of a text, head by head.

    The statistics are means over the positions from 1 on, since position 0 can only attend to itself; NaN for a
    text of one token.

    Attributes:
        patterns: (L, H, T, S); row t is the share of each source s in what token t reads.
        entropy: (L, H, T) of each row, in nats: from 0 (one source) to ln(t + 1) (uniform).
        distance: (L, H, T) mean distance to the source, in tokens.
        normalized_entropy: (L, H) mean of entropy / ln(t + 1): 0 is one token, 1 is uniform.
        mean_distance: (L, H); 1 for a previous-token head.
        first: (L, H) mean share of token 0, the attention sink (Xiao et al. 2023).
        previous: (L, H) mean share of the token before.
        current: (L, H) mean share of the token itself.
    """

    patterns: np.ndarray
    entropy: np.ndarray
    distance: np.ndarray
    normalized_entropy: np.ndarray
    mean_distance: np.ndarray
    first: np.ndarray
    previous: np.ndarray
    current: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        return self.weight_rows({"layer": self.layers, "head": self.heads}, weight=self.patterns)


@dataclass(frozen=True, kw_only=True)
class WeightedPatterns(AttentionPatterns):
    """Attention weighted by the size of what is read.

    Attributes:
        norms: (L, H, T, S) the sizes; `patterns` are their shares of each row, zero where a row moves nothing.
    """

    norms: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        return self.weight_rows({"layer": self.layers, "head": self.heads}, weight=self.patterns, norm=self.norms)


@dataclass(frozen=True, kw_only=True)
class CombinedAttention(Attention):
    """The attention of a text, with the heads of a layer combined.

    Attributes:
        weights: (L, T, S); of a rollout, the share of the stream after the layer that comes from each token.
    """

    weights: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        return self.weight_rows({"layer": self.layers}, weight=self.weights)


def attention_patterns(
    model: Transformer,
    tokens: Sequence[int],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    kind: str = "pattern",
) -> AttentionPatterns:
    """Return each head's pattern, optionally weighted by what the head reads.

    `pattern`: softmax(q k^T / sqrt(d_key)) under the causal mask (Vaswani et al. 2017, "Attention Is All You Need",
    equation 1). `value-weighted`: pattern times the norm of the source's value, ||A[t, s] v_s||, as CircuitsVis draws
    it. `norm-weighted`: the same after the head's output matrix, ||A[t, s] v_s W_O||, what really reaches the residual
    stream (Kobayashi et al. 2020, "Attention is Not Only a Weight", equation 5).

    Args:
        tokens: (T,) ids, at most `context_size` of them.
        layers, heads: which layers, and which heads of each (None: all).
        kind: one of `WEIGHTED`.

    Raises:
        LumiereError: there is no such kind.
        ValueError: the tokens do not fit the model.
    """
    check_choice("kind", kind, WEIGHTED)
    layers, heads = selected(layers, model.num_layers), selected(heads, model.num_heads)
    asked = {"tokens": tuple(tokens), "kind": kind, "layers": layers, "heads": heads}
    chosen = np.ix_(layers, heads)
    patterns, cache = run_attention(model, tokens, () if kind == "pattern" else ("hook_v", "hook_z", "hook_attn_out"))
    if kind == "pattern":
        patterns = patterns[chosen]
        receipts = (rows_sum_to_one(model, patterns), looks_back(patterns))
        return AttentionPatterns(**asked, patterns=patterns, **statistics(patterns), receipts=receipts)
    sizes, error = value_sizes(model, cache, patterns, projected=kind == "norm-weighted")
    norms = (patterns * sizes[:, :, None, :])[chosen]
    totals = norms.sum(-1, keepdims=True)
    shares = np.divide(norms, totals, out=np.zeros_like(norms), where=totals > 0)
    whole = "the attention output" if kind == "norm-weighted" else "each head's output"
    receipts = (Receipt(f"parts add up to {whole}", error, rounding(model)), looks_back(shares))
    return WeightedPatterns(**asked, patterns=shares, norms=norms, **statistics(shares), receipts=receipts)


def combined_attention(
    model: Transformer,
    tokens: Sequence[int],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    kind: str = "mean",
) -> CombinedAttention:
    """Combine the heads of each layer: `mean`, `max`, or `rollout`.

    Rollout (Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3): R_l = (A_l + I)/2 R_(l-1),
    where A_l is the mean over the heads, I stands for the residual connection and R_(-1) = I. It starts at layer 0,
    whichever layers are asked for, weights all heads and tokens alike, and ignores the feed-forward parts.

    Args:
        tokens: (T,) ids, at most `context_size` of them.
        layers, heads: which layers, and which heads are combined (None: all).
        kind: one of `COMBINED`.

    Raises:
        LumiereError: there is no such kind.
        ValueError: the tokens do not fit the model.
    """
    check_choice("kind", kind, COMBINED)
    layers, heads = selected(layers, model.num_layers), selected(heads, model.num_heads)
    chosen = list(layers)
    patterns = run_attention(model, tokens, ())[0][:, list(heads)]
    mean = patterns.mean(axis=1)
    if kind == "max":
        weights = patterns.max(axis=1)[chosen]
        below = float(np.maximum(mean[chosen] - weights, 0).max())
        check = Receipt("the largest is no less than the mean", below, rounding(model))
    else:
        weights = (mean if kind == "mean" else rollout(mean))[chosen]
        check = rows_sum_to_one(model, weights)
    receipts = (check, looks_back(weights))
    return CombinedAttention(
        tokens=tuple(tokens), kind=kind, layers=layers, heads=heads, weights=weights, receipts=receipts
    )


def run_attention(
    model: Transformer, tokens: Sequence[int], leaves: Sequence[str]
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Return the patterns of one forward pass, (L, H, T, S), and the activations `leaves` by layer, (1, T, ...)."""
    names = [
        f"blocks.{layer}.{'' if leaf == 'hook_attn_out' else 'attn.'}{leaf}"
        for layer in range(model.num_layers)
        for leaf in leaves
    ]
    with torch.inference_mode():
        output, cache = run_with_cache(model, one_sequence(model, tokens), names)
    return output.attention_weights[0].cpu().numpy(), cache


def value_sizes(
    model: Transformer, cache: Mapping[str, torch.Tensor], patterns: np.ndarray, projected: bool
) -> tuple[np.ndarray, float]:
    """Return the norm of each head's value at each source, (L, H, S), and the error of the weighted sums.

    Args:
        projected: whether after the head's output matrix, v W_O (E numbers), or before, v (V numbers).
    """
    sizes, error = [], 0.0
    for layer, block in enumerate(model.blocks):
        v_SHV = block.attention.per_head(cache[f"blocks.{layer}.attn.hook_v"][0], dim=1)
        given, whole = v_SHV, cache[f"blocks.{layer}.attn.hook_z"][0]
        if projected:
            output_EHV = block.attention.output.weight.detach().unflatten(1, (model.num_heads, model.d_value))
            given, whole = torch.einsum("shv,ehv->she", v_SHV, output_EHV), cache[f"blocks.{layer}.hook_attn_out"][0]
            if block.attention.output.bias is not None:  # which no head writes
                whole = whole - block.attention.output.bias
        weights_HTS = torch.from_numpy(patterns[layer]).to(given.device)
        added = torch.einsum("hts,shx->thx", weights_HTS, given)
        added = added.sum(1) if projected else added
        # NaN, if there is one, is the maximum.
        error = float(np.maximum(error, (added - whole).abs().max().item() / max(1.0, whole.abs().max().item())))
        sizes.append(torch.linalg.vector_norm(given, dim=-1).T.cpu().numpy())
    return np.stack(sizes), error


def rollout(mean: np.ndarray) -> np.ndarray:
    """Return the rollout after each layer, (L, T, S), from each layer's mean pattern."""
    reached, found = np.eye(mean.shape[-1], dtype=mean.dtype), []
    for pattern in mean:
        reached = (pattern @ reached + reached) / 2
        found.append(reached)
    return np.stack(found)


def statistics(patterns: np.ndarray) -> dict[str, Any]:
    """Return the statistics of `AttentionPatterns` by name."""
    size = patterns.shape[-1]
    logarithms = np.log(patterns, out=np.zeros_like(patterns), where=patterns > 0)
    entropy = np.maximum(-(patterns * logarithms).sum(-1), 0)
    positions = np.arange(size)
    distance = (patterns * np.maximum(positions[:, None] - positions, 0)).sum(-1)
    shares = {
        "normalized_entropy": entropy[..., 1:] / np.log(positions[1:] + 1),
        "mean_distance": distance[..., 1:],
        "first": patterns[..., 1:, 0],
        "previous": patterns.diagonal(-1, axis1=-2, axis2=-1),
        "current": patterns.diagonal(0, axis1=-2, axis2=-1)[..., 1:],
    }
    missing = np.full(patterns.shape[:-2], np.nan)
    means = {name: share.mean(-1) if size > 1 else missing for name, share in shares.items()}
    return {"entropy": entropy, "distance": distance, **means}


def rows_sum_to_one(model: Transformer, weights: np.ndarray) -> Receipt:
    return Receipt("rows sum to 1", float(np.abs(weights.sum(-1, dtype=np.float64) - 1).max()), rounding(model))


def looks_back(weights: np.ndarray) -> Receipt:
    return Receipt("no weight on a later token", float(np.triu(weights, k=1).max()), 0.0)
