"""What the model gains from a longer context: the in-context-learning score.

Shapes: N window, T position.
"""

from typing import Any

import numpy as np
import torch

from lumiere.components.kernels import linear_cross_entropy_losses
from lumiere.data.tokenizer import PAD
from lumiere.evaluation.scoring import clustered_means
from lumiere.models.transformer import Transformer

TOKENS_AT_ONCE = 4096
"""Tokens of a forward pass, so that long contexts do not take all memory."""


def in_context_learning(
    model: Transformer, windows_NT: torch.Tensor | None, documents_N: np.ndarray | None
) -> dict[str, Any]:
    """Mean loss at late minus mean loss at early positions of full windows, and its standard error by document.

    Olsson et al. 2022 take the tokens 500 and 50 of a context of 512. Here they are bands of positions, relative to the
    context: its last quarter, and 5 % to 15 %. Scores of different context sizes do not compare.

    Args:
        windows_NT: (N, context_size + 1) ids, `<|pad|>` after the end; only windows without it are used.
        documents_N: which document each window is cut from; None: each from one of its own.
    """
    bands = early, late = position_bands(model.context_size)
    if windows_NT is None or model.context_size < 2:
        return missing()
    is_full_N = windows_NT[:, -1] != PAD
    if not is_full_N.any():
        return missing()
    documents_N = np.arange(len(windows_NT)) if documents_N is None else documents_N
    weight, found = model.token_embedding.weight, []
    positions = [position for first, last in bands for position in range(first, last + 1)]
    for part_NT in windows_NT[is_full_N].split(max(1, TOKENS_AT_ONCE // model.context_size)):
        part_NT = part_NT.to(weight.device)
        with torch.inference_mode():
            # The loss at a position is that of predicting the token there from those before.
            residual = model.final_residual(part_NT[:, :-1])[:, [position - 1 for position in positions]]
            losses = linear_cross_entropy_losses(residual.flatten(0, 1), weight, part_NT[:, positions].flatten())
        found.append(losses.view(len(part_NT), -1).cpu().double().numpy())
    num_early = early[1] - early[0] + 1
    loss_NT = np.concatenate(found)
    losses_2N = np.stack([loss_NT[:, :num_early].mean(1), loss_NT[:, num_early:].mean(1)])
    score_1N = losses_2N[1:] - losses_2N[:1]
    (score,), (error,) = clustered_means(score_1N, np.ones(len(loss_NT)), documents_N[is_full_N.numpy()])
    return {
        "in_context_positions": ((early[0] + early[1]) // 2, (late[0] + late[1]) // 2),
        "in_context_bands": bands,
        "in_context_losses": losses_2N.mean(1),
        "in_context_score": np.array(score),
        "in_context_error": np.array(error),
        "in_context_windows": len(loss_NT),
        "in_context_documents": len(np.unique(documents_N[is_full_N.numpy()])),
    }


def position_bands(context_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the first and last position of the early and the late band; a position is the number of tokens before."""
    early = max(1, context_size // 20), max(1, 3 * context_size // 20)
    return early, (max(2, 3 * context_size // 4), context_size)


def missing() -> dict[str, Any]:
    """The fields without a text, or with a context of one token, which has no two positions."""
    return {
        "in_context_positions": None,
        "in_context_bands": None,
        "in_context_losses": np.full(2, np.nan),
        "in_context_score": np.array(np.nan),
        "in_context_error": np.array(np.nan),
        "in_context_windows": 0,
        "in_context_documents": 0,
    }
