"""Summarize a model: parameters, norms and ranks, what each part writes, and what looks wrong.

Shapes: M matrix, N norm, B batch, T position, V vocab_size (or rows of a table, d_value), E embedding_size, C
context_size, L layer, H head, F d_ff.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumiere.components.hooks import hook_points, run_with_cache
from lumiere.data.batches import Batch
from lumiere.interpret.result import FLOAT64_TOLERANCE, Receipt, Result, float64, relative_error, rounding, table
from lumiere.models.transformer import Transformer

PARTS: tuple[str, ...] = ("token_embedding", "positions", "attention", "feedforward", "norms")
"""The parts that every model is said to have; an output head that is not tied is one more, `output_head`."""
SIZES = ("norms", "rms", "spectral_norms", "stable_ranks", "effective_ranks")
ROWS_AT_ONCE = 1024
QUERY_KEY_NORMS = ("query_norm.weight", "key_norm.weight")


def count_parts(model: Transformer) -> dict[str, int]:
    """Count trainable numbers by part, as `PARTS` names them; a tied output head counts once."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    return counts


def part_of(name: str) -> str:
    """Return the part that a parameter of that name belongs to."""
    *path, module, _ = name.split(".")
    if module.endswith("norm"):
        return "norms"
    if module == "position_embedding":
        return "positions"
    return path[-1] if path else module


def matrix_facts(model: Transformer) -> dict[str, Any]:
    """Compute the fields of `ModelSummary` on matrices from their singular values, in float64."""
    matrices = {name: float64(value) for name, value in model.state_dict().items() if value.ndim == 2}
    facts = np.array([spectrum_facts(matrix) for matrix in matrices.values()])
    shapes = np.array([matrix.shape for matrix in matrices.values()])
    return {"matrices": tuple(matrices), "shapes": shapes, **dict(zip(SIZES, facts.T, strict=True))}


def spectrum_facts(matrix: np.ndarray) -> tuple[float, ...]:
    """Return the numbers that `SIZES` names."""
    if not np.isfinite(matrix).all():
        return (np.nan,) * len(SIZES)
    values = np.linalg.svd(matrix, compute_uv=False)
    largest = float(values.max())
    norm = float(np.sqrt(np.square(matrix).sum()))
    rms = norm / np.sqrt(matrix.size)
    if largest == 0:
        return norm, rms, 0.0, 0.0, 0.0
    shares = values / values.sum()
    entropy = -sum(share * np.log(share) for share in shares if share > 0)
    return norm, rms, largest, float(np.square(values / largest).sum()), float(np.exp(entropy))


def same_rows(table_VE: Tensor, cosine: float) -> Iterator[tuple[int, int]]:
    """Yield the rows that point the same way as an earlier one, with the first such row; rows of zeros point nowhere.

    Args:
        cosine: of the angle between the two, from which on they are the same.
    """
    directions_VE = torch.nn.functional.normalize(table_VE.detach().float(), dim=-1)
    for first in range(0, len(directions_VE), ROWS_AT_ONCE):
        rows = directions_VE[first : first + ROWS_AT_ONCE]
        near = (rows @ directions_VE[: first + len(rows)].T >= cosine).tril(diagonal=first - 1)
        found = near.any(dim=1).nonzero()[:, 0]
        # Of equal values, the first is the largest's place.
        earliest = near[found].int().argmax(dim=1)
        yield from zip((found + first).tolist(), earliest.tolist(), strict=True)


LEAVES = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out")
"""Activations of a block; some models lack the last three."""


def measure_activity(model: Transformer, batches: Iterable[Batch]) -> tuple[dict[str, Any], float]:
    """Measure what the parts do, one forward pass per batch, keeping only a few numbers of each layer.

    Args:
        batches: at least one.

    Returns:
        The fields of `ModelSummary` on activity, and the error of the logits against the products of the normalized
        stream with the output head, relative to the largest.
    """
    num_windows, num_tokens, head_error = 0, 0, 0.0
    writes_L2 = np.zeros((model.num_layers, 2))
    heads_LH = np.zeros((model.num_layers, model.num_heads))
    has_feedforward = model.settings.feedforward != "none"
    largest_LF = np.zeros((model.num_layers, model.d_ff if has_feedforward else 0))
    wanted = [f"blocks.{layer}.{leaf}" for layer in range(model.num_layers) for leaf in LEAVES]
    points = hook_points(model)
    names = [name for name in wanted if name in points]
    for batch in batches:
        tokens_BT = batch.tokens.to(model.token_embedding.weight.device)
        real_BT = batch.is_real.to(tokens_BT.device)
        with torch.inference_mode():
            output, cache = run_with_cache(model, tokens_BT, names)
            expected = model.final_norm(output.hidden_states[:, -1]) @ model.unembedding.T
            head_error = float(np.maximum(head_error, relative_error(output.logits, expected)))  # NaN, if there is one
            for layer in range(model.num_layers):
                # Only real tokens: N of them in place of B and T.
                found = {leaf: cache[name][real_BT] for leaf in LEAVES if (name := f"blocks.{layer}.{leaf}") in cache}
                scale_N = lengths(found["hook_resid_pre"])
                writes_L2[layer, 0] += total(lengths(found["hook_attn_out"]) / scale_N)
                heads_LH[layer] += total(head_lengths(model, layer, found["attn.hook_z"]) / scale_N[:, None])
                if has_feedforward:
                    read_NE = found.get("hook_resid_mid", found["hook_resid_pre"])
                    writes_L2[layer, 1] += total(lengths(found["hook_mlp_out"]) / lengths(read_NE))
                    largest_LF[layer] = np.maximum(largest_LF[layer], float64(found["mlp.hook_post"].abs().amax(0)))
        num_windows += len(tokens_BT)
        num_tokens += int(real_BT.sum())
    return {
        "num_windows": num_windows,
        "num_tokens": num_tokens,
        "writes": writes_L2 / num_tokens,
        "head_writes": heads_LH / num_tokens,
        "largest_activations": largest_LF,
    }, head_error


def head_lengths(model: Transformer, layer: int, z_NHV: Tensor) -> Tensor:
    """Return the norm of what each head writes, (N, H), `|z W|`, by the Gram matrix of its output rows W."""
    weight_EHV = model.blocks[layer].attention.output.weight.unflatten(1, (model.num_heads, model.d_value))
    gram_HVV = torch.einsum("ehv,ehw->hvw", weight_EHV, weight_EHV)
    return torch.einsum("nhv,hvw,nhw->nh", z_NHV, gram_HVV, z_NHV).clamp(min=0).sqrt()


def lengths(vectors_NE: Tensor) -> Tensor:
    """Return norms, (N,), clamped above 0 so that they can be divisors."""
    return torch.linalg.vector_norm(vectors_NE, dim=-1).clamp(min=torch.finfo(vectors_NE.dtype).tiny)


def total(values: Tensor) -> np.ndarray:
    """Return the sum over the first axis in float64."""
    return values.cpu().double().sum(0).numpy()


SILENT = 1e-3
"""A part that writes less than this share of the stream's norm does nothing."""
DEAD = 1e-6
"""A neuron whose activation never exceeds this, in absolute value, is dead."""
SMALL_GAIN = 1e-2
"""A gain below this, in absolute value, shuts its direction out."""
LOW_RANK = 0.1
"""A matrix whose effective rank is below this share of the largest possible has collapsed."""
SAME = 0.999
"""Rows with this cosine or more have the same vector."""
PLACES_KEPT = 1000
"""Places of a check that are named; all are counted."""


@dataclass(frozen=True)
class Check:
    """Something that may be wrong, and where.

    Attributes:
        what: the problem.
        threshold: from where on it counts.
        count: how often it was found.
        places: where, the first `PLACES_KEPT`.
    """

    what: str
    threshold: str
    count: int
    places: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSummary(Result):
    """What is in a model. Fields that need a text are None without one.

    Attributes:
        parameters: by part; a token embedding that is the output head too counts once.
        matrices: (M,) the names of the matrices in the state dict. Their facts are computed in float64; NaN for a
            matrix that is not finite.
        shapes: (M, 2).
        norms: (M,) Frobenius.
        rms: (M,) root mean square of the entries.
        spectral_norms: (M,) the largest singular values.
        stable_ranks: (M,) Frobenius norm squared over spectral norm squared.
        effective_ranks: (M,) the exponential of the entropy of the singular values over their sum (Roy & Vetterli 2007,
            "The Effective Rank"). Both ranks are 0 for a matrix of zeros.
        gain_names: (N,) the norms with a gain.
        gains: (N, E).
        token_norms: (V,) norms of the rows of the token embedding.
        token_mean_share: of the mean square of a row, how much is the mean row's.
        position_norms: (C,) norms of the rows of the position embedding; None unless positions are learned.
        position_cosine: mean cosine of neighboring rows of it.
        num_windows, num_tokens: of the text that was read, without padding. The means are over these tokens.
        writes: (L, 2) the norm of what attention and feed-forward part write, over that of the stream before it.
        head_writes: (L, H) the same of each head.
        largest_activations: (L, F) the largest absolute activation of each neuron.
        checks: all checks; those that found something are warnings.
    """

    parameters: Mapping[str, int]
    matrices: tuple[str, ...]
    shapes: np.ndarray
    norms: np.ndarray
    rms: np.ndarray
    spectral_norms: np.ndarray
    stable_ranks: np.ndarray
    effective_ranks: np.ndarray
    gain_names: tuple[str, ...]
    gains: np.ndarray
    token_norms: np.ndarray
    token_mean_share: float
    position_norms: np.ndarray | None
    position_cosine: float | None
    num_windows: int = 0
    num_tokens: int = 0
    writes: np.ndarray | None = None
    head_writes: np.ndarray | None = None
    largest_activations: np.ndarray | None = None
    checks: tuple[Check, ...]

    @property
    def warnings(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.count)

    def rows(self) -> Iterator[Mapping[str, Any]]:
        rows, columns = self.shapes.T
        sizes = {name if name == "rms" else name.removesuffix("s"): getattr(self, name) for name in SIZES}
        return table({"matrix": self.matrices}, rows=rows, columns=columns, **sizes)


def summarize(
    model: Transformer, batches: Sequence[Batch] = (), token_counts: np.ndarray | None = None
) -> ModelSummary:
    """Summarize parameters, norms, ranks, gains and embeddings, what the parts do on `batches`, and checks.

    Args:
        batches: a text, such as validation windows; none: the weights alone.
        token_counts: (V,) counts of the tokens in the training split, if known.
    """
    parameters, facts = count_parts(model), matrix_facts(model)
    gains = {
        name: value
        for name, value in model.state_dict().items()
        if name.endswith("norm.weight") and len(value) == model.embedding_size and not name.endswith(QUERY_KEY_NORMS)
    }
    gains_NE = np.array([float64(gain) for gain in gains.values()]).reshape(-1, model.embedding_size)
    table_VE = float64(model.token_embedding.weight)
    token_norms = np.linalg.norm(table_VE, axis=1)
    position_norms = position_cosine = None
    if model.position_embedding is not None:
        position_CE = float64(model.position_embedding.weight)
        position_norms = np.linalg.norm(position_CE, axis=1)
        directions_CE = position_CE / np.maximum(position_norms, np.finfo(float).tiny)[:, None]
        cosines = (directions_CE[1:] * directions_CE[:-1]).sum(1)
        position_cosine = float(cosines.mean()) if len(cosines) else 1.0
    activity, head_error = measure_activity(model, batches) if batches else ({}, None)
    result = ModelSummary(
        parameters=parameters,
        **facts,
        gain_names=tuple(name.removesuffix(".weight") for name in gains),
        gains=gains_NE,
        token_norms=token_norms,
        token_mean_share=float(np.square(table_VE.mean(0)).sum() / np.square(token_norms).mean()),
        position_norms=position_norms,
        position_cosine=position_cosine,
        **activity,
        checks=(),
        receipts=(),
    )
    checks = tuple(
        Check(what, threshold, len(places), tuple(places[:PLACES_KEPT]))
        for what, threshold, places in find_problems(model, result, token_counts)
    )
    return replace(result, checks=checks, receipts=tuple(receipts(model, result, head_error)))


def receipts(model: Transformer, result: ModelSummary, head_error: float | None) -> Iterator[Receipt]:
    yield Receipt("the parts hold all parameters", abs(sum(result.parameters.values()) - model.num_parameters), 0.0)
    by_rank = result.spectral_norms * np.sqrt(result.stable_ranks)
    error = np.abs(by_rank - result.norms) / np.maximum(result.norms, np.finfo(float).tiny)
    yield Receipt(
        "spectral norm x root of the stable rank is the Frobenius norm", float(error.max()), FLOAT64_TOLERANCE
    )
    largest = np.maximum(result.stable_ranks, result.effective_ranks) / result.shapes.min(axis=1)
    yield Receipt("no rank exceeds the shape", float(np.maximum(largest.max() - 1, 0.0)), FLOAT64_TOLERANCE)
    if head_error is not None:
        head = "the token embedding (tied)" if model.output_head is None else "a matrix of its own"
        yield Receipt(f"the output head is {head}", head_error, rounding(model))


def find_problems(
    model: Transformer, result: ModelSummary, token_counts: np.ndarray | None
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Yield what may be wrong, its threshold, and all places where it was found."""
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    yield "weights that are no finite numbers", "any", broken
    collapsed = np.flatnonzero(result.effective_ranks < LOW_RANK * result.shapes.min(axis=1))
    low = f"effective rank below {LOW_RANK:.0%} of the smaller side"
    yield "matrices of low rank", low, [result.matrices[number] for number in collapsed]
    small = [f"{result.gain_names[row]}.{column}" for row, column in np.argwhere(np.abs(result.gains) < SMALL_GAIN)]
    yield "gains that shut a direction out", f"absolute value below {SMALL_GAIN:g}", small
    yield "tokens without a vector", "norm 0", [f"{token}" for token in np.flatnonzero(result.token_norms == 0)]
    tables: dict[str, Tensor] = {"tokens with the vector of an earlier token": model.token_embedding.weight}
    if model.position_embedding is not None:
        tables["positions with the vector of an earlier one"] = model.position_embedding.weight
    for what, weight in tables.items():
        yield what, f"cosine {SAME:g} or more", [f"{row}, {earlier}" for row, earlier in same_rows(weight, SAME)]
    if token_counts is not None:
        never = [f"{token}" for token in np.flatnonzero(token_counts == 0)]
        yield "tokens that were never met in training", "not once in the training split", never
    if result.writes is None or result.head_writes is None or result.largest_activations is None:
        return
    silent, parts = f"writes below {SILENT:.1%} of the stream", ("attention", "feed-forward")
    written = result.writes if model.settings.feedforward != "none" else result.writes[:, :1]
    named = [f"L{layer} {parts[part]}" for layer, part in np.argwhere(written < SILENT)]
    yield "parts of layers that do nothing", silent, named
    heads = [f"L{layer}H{head}" for layer, head in np.argwhere(result.head_writes < SILENT)]
    yield "heads that do nothing", silent, heads
    dead = [f"L{layer}N{neuron}" for layer, neuron in np.argwhere(result.largest_activations <= DEAD)]
    yield "dead neurons", f"never above {DEAD:g} in {result.num_tokens:,} tokens", dead
