"""Random tokens that come twice: whoever predicts the second copy looked back for it, since nothing else tells.

Shapes: N sequence, S tokens of a copy, T = 2 S + 1 position.
"""

import torch

from lumiere.models.transformer import Transformer

SEQUENCES = 32
COPY_LENGTH = 25
"""As many tokens as Olsson et al. 2022 draw; fewer where the context or the vocabulary is smaller."""


def longest_copy(model: Transformer, num_tokens: int) -> int:
    """How many of `num_tokens` different tokens fit the model twice, after a start token."""
    return min((model.context_size - 1) // 2, num_tokens)


def first_copied(length: int) -> int:
    """The first position that counts as copied: the second copy's second token. Nothing announces its first one."""
    return length + 2


def repeated_tokens(
    num_tokens: int, length: int, num_sequences: int, seed: int, *, start: int, first: int
) -> torch.Tensor:
    """(N, 2 S + 1) ids: the start token and `length` different random tokens, twice.

    Drawn without replacement, since a token that comes back by chance would be another place to look at.

    Args:
        num_tokens: how many tokens to draw from: `first`, `first` + 1, and so on.
        length: S.
        start: the id of the start token.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(num_tokens, generator=generator)[:length] + first for _ in range(num_sequences)]
    once_NS = torch.stack(drawn)
    return torch.cat([torch.full((num_sequences, 1), start), once_NS, once_NS], dim=1)
