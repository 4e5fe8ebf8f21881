"""What an exported model must compute: logits on stated tokens, saved beside its weights.

Shapes: B batch, T position, Vocab vocab_size.
"""

import torch
from torch import Tensor

from lumiere.interpret.result import Receipt
from lumiere.models.transformer import Transformer

MAX_TOKENS = 256
"""Longest stated sequence: the logits of each token take as much room as `vocab_size` numbers."""


def stated_tokens(context_size: int, ids: range) -> Tensor:
    """(1, T) random ids, always the same; as many as the context holds, so that all its positions are compared.

    Args:
        context_size: longest sequence of the model; T is at most this and `MAX_TOKENS`.
        ids: those to draw from.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randint(ids.start, ids.stop, (1, min(context_size, MAX_TOKENS)), generator=generator)


@torch.inference_mode()
def logits_of(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """(B, T, Vocab), through the watching path, which all analyses take."""
    return model(tokens_BT).logits


def logits_receipt(law: str, found_BTVocab: Tensor, expected_BTVocab: Tensor, tolerance: float) -> Receipt:
    """How far two sets of logits are apart, relative to the largest."""
    if found_BTVocab.shape != expected_BTVocab.shape:
        return Receipt(law, float("inf"), tolerance)
    scale = max(1.0, expected_BTVocab.abs().max().item())
    return Receipt(law, (found_BTVocab - expected_BTVocab).abs().max().item() / scale, tolerance)
