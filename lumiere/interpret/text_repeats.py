"""Head scores and copying at repeated names of real text, beside those on random tokens.

A natural repeat is a pair of neighboring tokens that occurred before in the same window of a document and that few
documents contain: mostly the inside of names.

Shapes: N window, T position (destination), S position (source), L layer, H head, M score, C = T pairs of a window.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lumiere.data.tokenizer import SPECIAL_TOKENS
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret.heads import SCORES, THRESHOLD, TOKENS_AT_ONCE, HeadScores, head_scores, source_masks
from lumiere.interpret.result import Receipt, rounding
from lumiere.models.transformer import Transformer

MOST_TOKENS = 2**15
RARE = 0.02
"""The largest share of the documents that a pair may occur in; a single document is always allowed."""


def score_heads(
    model: Transformer,
    tokens_NT: torch.Tensor,
    windows: tuple[torch.Tensor, np.ndarray] | None = None,
    averaged: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    threshold: float = THRESHOLD,
) -> HeadScores:
    """Score heads on `tokens_NT` and, where there are windows of real text, on the names that are repeated there.

    Args:
        windows: (N, context_size + 1) ids, `<|pad|>` after the end, and (N,) the document that each is cut from.
    """
    if windows is None:
        return head_scores(model, tokens_NT, layers, heads, threshold, averaged=averaged)
    scores = head_scores(model, tokens_NT, layers, heads, threshold, *windows, averaged=averaged)
    return add_text_repeats(scores, model, *windows)


def add_text_repeats(
    result: HeadScores, model: Transformer, windows_NT: torch.Tensor, documents_N: np.ndarray
) -> HeadScores:
    """Return head scores with those on natural repeats added, as the fields `text_...`.

    The scores are those of `head_scores`, with the same sources, but the mean is only over destinations at which a
    natural repeat starts: token t and t + 1 occurred before, one after the other, so that copying what came next is
    right. `text_gap` is the mean, over these repeats, of the loss of token t + 1 where the pair first occurred in the
    window, minus its loss here. A model that reads only the current token has a gap of exactly 0, since it predicts the
    same at both places.

    Args:
        result: of the same model; its layers and heads are scored.
        windows_NT: (N, context_size + 1) ids, `<|pad|>` after the end. Of more than `MOST_TOKENS` tokens, every second,
            third, ... window is read, since attention patterns take longer than losses.
        documents_N: which document each window is cut from.
    """
    every = -(-windows_NT.numel() // MOST_TOKENS)
    windows_NT, documents_N = windows_NT[::every], documents_N[::every]
    firsts_NC = first_occurrences(windows_NT, documents_N)
    weight = model.token_embedding.weight
    totals, uniform, counts, row_error = 0.0, np.zeros(len(SCORES)), np.zeros(len(SCORES)), 0.0
    gaps = []
    rows = max(1, TOKENS_AT_ONCE // model.context_size)
    for part_NT, firsts_BC in zip(windows_NT.split(rows), firsts_NC.split(rows), strict=True):
        tokens_BT, is_repeat_BT = part_NT[:, :-1], firsts_BC >= 0
        sources = source_masks(tokens_BT)[0] & is_repeat_BT[:, None, :, None]
        with torch.inference_mode():
            output = model(tokens_BT.to(weight.device))
            patterns = output.attention_weights[:, list(result.layers)][:, :, list(result.heads)]
            masks = sources.to(patterns.device, patterns.dtype)
            totals += torch.einsum("nlhts,nmts->lhm", patterns, masks).cpu().double().numpy()
            chosen = output.logits.gather(-1, part_NT[:, 1:, None].to(weight.device))[..., 0]
            loss_BT = (output.logits.logsumexp(-1) - chosen).cpu().double()
            row_error = max(row_error, (patterns.sum(-1) - 1).abs().max().item())
        num_sources_BMT = sources.sum(-1).numpy()
        uniform += (num_sources_BMT / np.arange(1, tokens_BT.shape[1] + 1)).sum((0, 2))
        counts += (num_sources_BMT > 0).sum((0, 2))
        gaps.append((loss_BT.gather(1, firsts_BC.clamp(min=0)) - loss_BT).where(is_repeat_BT, 0.0).sum(1).numpy())
    repeats_N = (firsts_NC >= 0).sum(1).numpy()
    found = repeats_N > 0
    gap = error = np.full(1, np.nan)
    if found.any():
        gap, error = clustered_means(np.concatenate(gaps)[None, found], repeats_N[found], documents_N[found])
    with np.errstate(invalid="ignore"):
        return replace(
            result,
            text_scores=totals / counts,
            text_uniform=uniform / counts,
            text_repeats=int(repeats_N.sum()),
            text_documents=len(np.unique(documents_N[found])),
            text_gap=np.array(gap[0]),
            text_gap_error=np.array(error[0]),
            receipts=(*result.receipts, Receipt("rows sum to 1 on text", row_error, rounding(model))),
        )


def first_occurrences(windows_NT: torch.Tensor, documents_N: np.ndarray) -> torch.Tensor:
    """Return where the natural repeat at each position first occurred in the window, (N, C); -1 if there is none."""
    pairs_NC = windows_NT[:, :-1] * (int(windows_NT.max()) + 1) + windows_NT[:, 1:]
    is_text_NC = (windows_NT[:, :-1] >= len(SPECIAL_TOKENS)) & (windows_NT[:, 1:] >= len(SPECIAL_TOKENS))
    same_NCC = (pairs_NC[:, :, None] == pairs_NC[:, None, :]).tril(diagonal=-1)
    has_earlier_NC = same_NCC.any(-1) & is_text_NC & torch.from_numpy(rare_pairs(pairs_NC.numpy(), documents_N))
    # Of equal values, the first is the largest's place.
    return same_NCC.byte().argmax(-1).where(has_earlier_NC, -1)


def rare_pairs(pairs_NC: np.ndarray, documents_N: np.ndarray) -> np.ndarray:
    """Return whether each pair occurs in few of the documents, (N, C)."""
    numbers, pairs = np.unique(pairs_NC, return_inverse=True)
    names, documents = np.unique(documents_N, return_inverse=True)
    occurrences = np.unique(documents[:, None] * len(numbers) + pairs.reshape(pairs_NC.shape))
    frequencies = np.bincount(occurrences % len(numbers), minlength=len(numbers))
    return (frequencies <= max(1, int(RARE * len(names))))[pairs].reshape(pairs_NC.shape)
