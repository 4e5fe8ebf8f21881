"""The circuits of each attention head, read from the weights alone: singular directions, tokens, and composition.

Shapes: L layer, H head, C circuit (`CIRCUITS`), R singular value, D direction, S side (`SIDES`), K listed token, E
embedding_size, P pair of heads, N token of a list.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.interpret.head_scores import Composition, composition_scores, layer_matrices
from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, Result, float64, selected
from lumiere.models.transformer import Transformer

CIRCUITS = ("ov", "qk")
SIDES = {"ov": ("reads", "writes"), "qk": ("query", "key")}
CONSTANTS = ("query", "key", "value")
CLOSE = 1.02
"""Singular values closer than this ratio to the next one share a subspace, as in TransformerLens 4."""
VANISHING = 1e-10
"""Directions with a smaller share of the largest singular value than this are rounding: they have no tokens."""
NO_TOKEN = -1
RANDOM_PAIRS = 100


@dataclass(frozen=True, kw_only=True)
class HeadWeights(Result):
    """The OV and QK circuit of each head, and the composition of all pairs of heads.

    Attributes:
        layers, heads: (L,), (H,) the chosen ones, counted from 0.
        circuits: (C,) `CIRCUITS`.
        norms: (L, H, C) Frobenius norms.
        singular_values: (L, H, C, R) largest first; NaN beyond the rank that the shapes allow.
        groups: (L, H, C, R) the number of the first singular value of the same group. Those of a group differ by less
            than `CLOSE` from one to the next: their directions span a subspace, and each alone is arbitrary.
        effective_ranks: (L, H, C) exp of the entropy of the shares of the singular values (Roy & Vetterli 2007).
        tokens, effects: (L, H, C, D, S, K) the tokens with the largest dot product with a direction, and that number.
            `NO_TOKEN` and NaN where the singular value vanishes.
        constants: (3,) `CONSTANTS`, the biases with those of the norm.
        constant_norms: (L, H, 3) what the bias of the queries adds to a key's score, |W_K b_Q|; that of the keys to a
            query's score, |W_Q b_K|, equal for all keys, so that attention does not change; and that of the values to
            the stream, |b_V W_O|, wherever the head attends.
        pairs, kinds, scores, chance: as `Composition`.
        random_means, random_highs: (3,) the mean and the largest score of `RANDOM_PAIRS` pairs of random matrices of
            the same shapes, by kind.
    """

    DISCRETE = frozenset({"effects"})

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    circuits: tuple[str, ...]
    norms: np.ndarray
    singular_values: np.ndarray
    groups: np.ndarray
    effective_ranks: np.ndarray
    tokens: np.ndarray
    effects: np.ndarray
    constants: tuple[str, ...]
    constant_norms: np.ndarray
    kinds: tuple[str, ...]
    pairs: np.ndarray
    scores: np.ndarray
    chance: float
    random_means: np.ndarray
    random_highs: np.ndarray

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield one number a row: a quantity, of which circuit, bias or kind, and its places."""

        def number(quantity: str, of: str, a: str, b: str | int, value: float) -> Mapping[str, Any]:
            return {"quantity": quantity, "of": of, "a": a, "b": str(b), "value": float(value)}

        for row, layer in enumerate(self.layers):
            for h, head in enumerate(self.heads):
                name = f"L{layer}H{head}"
                for c, circuit in enumerate(self.circuits):
                    yield number("norm", circuit, name, "", self.norms[row, h, c])
                    yield number("effective_rank", circuit, name, "", self.effective_ranks[row, h, c])
                    for place, value in enumerate(self.singular_values[row, h, c]):
                        yield number("singular_value", circuit, name, place, value)
                for constant, value in zip(self.constants, self.constant_norms[row, h], strict=True):
                    yield number("constant_norm", constant, name, "", value)
        for (layer, head, later_layer, later_head), scores in zip(self.pairs.tolist(), self.scores, strict=True):
            for kind, score in zip(self.kinds, scores, strict=True):
                yield number("composition", kind, f"L{layer}H{head}", f"L{later_layer}H{later_head}", score)


def head_weights(
    model: Transformer,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    directions: int = 3,
    top_k: int = 5,
    listed: Sequence[int] | None = None,
    seed: int = 0,
) -> HeadWeights:
    """Read the circuits of heads from the weights (Elhage et al. 2021, "A Mathematical Framework for ...").

    `W_OV = W_V W_O` and `W_QK = W_Q W_K^T`, (E, E), for row vectors, with the norms' gains in the matrices that read,
    in float64. With rotary positions, W_QK is that of a query and a key at the same position. Scores also have the
    factor of attention (1 / sqrt(d_key)), which is not in W_QK.

    `W = U S V^T`, by QR decompositions of the two factors. A direction of U reads: of the embedding of a token, or of
    the query's side. Its direction of V writes, which the folded unembedding reads, or is the key's side. The sign is
    chosen so that the largest effect on the first side is positive.

    Args:
        layers, heads: The circuits to decompose. Default: all. Compositions are of all heads.
        directions: Singular directions with tokens.
        top_k: Tokens of each side of a direction.
        listed: The ids to choose from. Default: all.
        seed: Of the random matrices.
    """
    layers, heads = selected(layers, model.num_layers), selected(heads, model.num_heads)
    ids = np.arange(model.vocab_size) if listed is None else np.array(listed)
    embedding_NE = float64(model.token_embedding.weight)[ids]
    readout_NE = float64(model.readout()[0])[ids]
    tables = {"ov": (embedding_NE, readout_NE), "qk": (embedding_NE, embedding_NE)}
    found: dict[str, list[Any]] = {name: [] for name in ("norms", "values", "tokens", "effects", "constants")}
    error = 0.0
    for layer in layers:
        reads, writes, queries, keys = (part[list(heads)] for part in layer_matrices(model, layer))
        factors = {"ov": (reads, writes), "qk": (queries, keys.swapaxes(-1, -2))}
        found["constants"].append(constant_norms(model, layer, writes, queries, keys, heads))
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("norms", "values", "tokens", "effects")}
        for circuit in CIRCUITS:
            tall, wide = factors[circuit]
            left_HER, values_HR, right_HER = factored_svd(tall, wide)
            norms_H = np.sqrt((values_HR**2).sum(-1))
            error = max(error, svd_error(tall, wide, left_HER, values_HR, right_HER))
            tokens, effects = top_tokens(tables[circuit], (left_HER, right_HER), values_HR, ids, directions, top_k)
            for name, values in zip(parts, (norms_H, values_HR, tokens, effects), strict=True):
                parts[name].append(values)
        width = max(values.shape[-1] for values in parts["values"])
        parts["values"] = [
            np.pad(values, ((0, 0), (0, width - values.shape[-1])), constant_values=np.nan)
            for values in parts["values"]
        ]
        for name, values in parts.items():
            found[name].append(np.stack(values, axis=1))
    values_LHCR = np.stack(found["values"])
    composition = composition_scores(model)
    means, highs = random_scores(model, composition, seed)
    return HeadWeights(
        layers=layers,
        heads=heads,
        circuits=CIRCUITS,
        norms=np.stack(found["norms"]),
        singular_values=values_LHCR,
        groups=groups_of(values_LHCR),
        effective_ranks=effective_ranks(values_LHCR),
        tokens=np.stack(found["tokens"]),
        effects=np.stack(found["effects"]),
        constants=CONSTANTS,
        constant_norms=np.stack(found["constants"]),
        kinds=composition.kinds,
        pairs=composition.pairs,
        scores=composition.scores,
        chance=composition.chance,
        random_means=means,
        random_highs=highs,
        receipts=(
            Receipt("each circuit is U S V^T, with orthonormal U and V", error, FLOAT64_TOLERANCE),
            *composition.receipts,
        ),
    )


def factored_svd(tall: np.ndarray, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decompose the products `tall @ wide`, (..., E, K) and (..., K, E), without computing them.

    Returns:
        U (..., E, R), the singular values (..., R), largest first, and V (..., E, R); R is the smaller of E and K.
    """
    left, left_small = np.linalg.qr(tall)
    right, right_small = np.linalg.qr(wide.swapaxes(-1, -2))
    u, values, vt = np.linalg.svd(left_small @ right_small.swapaxes(-1, -2))
    return left @ u, values, right @ vt.swapaxes(-1, -2)


def svd_error(tall: np.ndarray, wide: np.ndarray, left: np.ndarray, values: np.ndarray, right: np.ndarray) -> float:
    """Return the largest error of U S V^T relative to the norm of the product, and of U^T U and V^T V."""
    product = tall @ wide
    sizes = np.maximum(np.linalg.norm(product, axis=(-2, -1)), np.finfo(float).tiny)
    residual = product - (left * values[..., None, :]) @ right.swapaxes(-1, -2)
    identity = np.eye(values.shape[-1])
    errors = [np.linalg.norm(residual, axis=(-2, -1)) / sizes]
    errors += [np.abs(side.swapaxes(-1, -2) @ side - identity) for side in (left, right)]
    return max(float(each.max()) for each in errors)


def top_tokens(
    tables: tuple[np.ndarray, np.ndarray],
    sides: tuple[np.ndarray, np.ndarray],
    values_HR: np.ndarray,
    ids: np.ndarray,
    directions: int,
    top_k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens with the largest effect on both sides of directions, and the effects, (H, D, S, K) each.

    Args:
        tables: (N, E) what each side of a circuit is compared with.
        sides: (H, E, R) its singular vectors.
    """
    num_heads, count = len(values_HR), min(directions, values_HR.shape[1])
    shape = num_heads, directions, 2, top_k
    tokens, effects = np.full(shape, NO_TOKEN), np.full(shape, np.nan)
    size = tables[0].shape[1]
    first, second = (
        table @ side[:, :, :count].swapaxes(1, 2).reshape(-1, size).T for table, side in zip(tables, sides, strict=True)
    )
    signs = np.where(np.take_along_axis(first, np.abs(first).argmax(0)[None], axis=0) < 0, -1.0, 1.0)
    for number, values in enumerate((first * signs, second * signs)):
        order = np.argsort(-values, axis=0, kind="stable")[:top_k]
        best = np.take_along_axis(values, order, axis=0)
        tokens[:, :count, number, : len(order)] = ids[order].T.reshape(num_heads, count, -1)
        effects[:, :count, number, : len(order)] = best.T.reshape(num_heads, count, -1)
    largest_H1 = np.maximum(values_HR[:, :1], np.finfo(float).tiny)
    vanishes = np.pad(values_HR[:, :count] <= VANISHING * largest_H1, ((0, 0), (0, directions - count)))
    tokens[vanishes], effects[vanishes] = NO_TOKEN, np.nan
    return tokens, effects


def groups_of(values: np.ndarray) -> np.ndarray:
    """Return the number of the first singular value of each one's group, as `HeadWeights.groups`."""
    # Not `earlier / later`, which zeros and padding would break.
    starts = np.ones(values.shape, dtype=bool)
    starts[..., 1:] = ~(values[..., :-1] <= CLOSE * values[..., 1:])
    return np.maximum.accumulate(np.where(starts, np.arange(values.shape[-1]), 0), axis=-1)


def effective_ranks(values: np.ndarray) -> np.ndarray:
    """Return exp of the entropy of the shares of the singular values; NaN if all are 0."""
    total = np.nansum(values, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = values / total
        terms = np.where(shares > 0, -shares * np.log(shares), 0.0)
    return np.where(total[..., 0] > 0, np.exp(terms.sum(-1)), np.nan)


def constant_norms(
    model: Transformer, layer: int, writes: np.ndarray, queries: np.ndarray, keys: np.ndarray, heads: Sequence[int]
) -> np.ndarray:
    """Return the sizes of what the biases of chosen heads do, (H, 3), as `HeadWeights.constant_norms`."""
    block = model.blocks[layer]
    attention, found = block.attention, []
    gains = {"query": attention.query_norm, "key": attention.key_norm}
    for part in CONSTANTS:
        linear, norm = getattr(attention, part), gains.get(part)
        bias = None if linear.bias is None else linear.bias.detach().double()
        with torch.no_grad():
            offset = block.attention_norm.folded(linear.weight.detach().double(), bias)[1]
        if offset is None:
            found.append(np.zeros(len(heads)))
            continue
        num_heads = model.num_heads if part == "query" else attention.num_key_value_heads
        offset_HK = offset.unflatten(0, (num_heads, -1))
        offset_HK = offset_HK if part == "query" else attention.per_head(offset_HK, dim=0)
        if norm is not None and norm.weight is not None:
            offset_HK = offset_HK * norm.weight.to(offset_HK)
        matrix_HKE = {"query": keys.swapaxes(-1, -2), "key": queries.swapaxes(-1, -2), "value": writes}[part]
        found.append(np.linalg.norm(float64(offset_HK)[list(heads), None] @ matrix_HKE, axis=(-2, -1)))
    return np.stack(found, axis=1)


def random_scores(model: Transformer, composition: Composition, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and largest composition score of random Gaussian matrices of the heads' shapes, (3,) each."""
    draw = np.random.default_rng(seed)
    size, (value, key) = model.embedding_size, (model.d_value, model.d_key)
    found = []
    for kind in composition.kinds:
        inner = value if kind == "v" else key
        scores = np.empty(RANDOM_PAIRS)
        for number in range(RANDOM_PAIRS):
            ov = draw.normal(size=(size, value)), draw.normal(size=(value, size))
            later = draw.normal(size=(size, inner)), draw.normal(size=(inner, size))
            joined = ov[0], ov[1] @ later[0] @ later[1]
            scores[number] = product_norm(*joined) / (product_norm(*ov) * product_norm(*later))
        found.append(scores)
    return np.mean(found, axis=1), np.max(found, axis=1)


def product_norm(tall: np.ndarray, wide: np.ndarray) -> float:
    """Return the Frobenius norm of a product, (E, K) by (K, E), by the trace of two (K, K) matrices."""
    return float(np.sqrt(np.sum((tall.T @ tall) * (wide @ wide.T))))
