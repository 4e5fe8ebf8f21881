"""Batches of random sequences of different lengths."""

from collections.abc import Sequence

import torch

from lumiere.components.kernels import IGNORED
from lumiere.data.batches import Batch
from lumiere.data.tokenizer import PAD


def batch_of(lengths: Sequence[int], seed: int = 0, width: int = 10) -> Batch:
    """Random sequences, padded on the right to `width` tokens and one target more."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 300, (len(lengths), width + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row, length in enumerate(lengths):
        tokens[row, length:] = PAD
        targets[row, length - 1 :] = IGNORED
    return Batch(tokens[:, :-1].contiguous(), targets, int((targets != IGNORED).sum()))
