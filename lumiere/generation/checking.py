"""Whether the cache gives what full forward passes give: `lumiere generate --check`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lumiere.generation.window import Decoder

ALLOWED = {torch.float64: 1e-10}
ALLOWED_ELSEWHERE = 1e-4


@dataclass(frozen=True)
class CacheCheck:
    """How far the two are apart.

    Attributes:
        num_steps: logits compared.
        difference: the largest between two logits, by the size of the largest logit where that is more than 1.
        allowed: the difference that rounding explains.
    """

    num_steps: int
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


def check_cache(decoder: Decoder, slow: Decoder, prompt: Sequence[int], tokens: Sequence[int]) -> CacheCheck:
    """Write `tokens` after `prompt` again with both decoders, and compare their logits at each step.

    Args:
        decoder: the one with a cache.
        slow: `FullForward`, whose windows slide by the same rule.
    """
    difference, dtype = 0.0, torch.float32
    for i in range(len(tokens) + 1):
        ours, theirs = (
            (each.start([prompt]) if i == 0 else each.step([tokens[i - 1]])).cpu() for each in (decoder, slow)
        )
        dtype = theirs.dtype
        is_open = theirs > -torch.inf
        if not torch.equal(is_open, ours > -torch.inf):
            return CacheCheck(i + 1, float("inf"), ALLOWED.get(dtype, ALLOWED_ELSEWHERE))
        ours, theirs = ours[is_open], theirs[is_open]
        difference = max(difference, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    return CacheCheck(len(tokens) + 1, difference, ALLOWED.get(dtype, ALLOWED_ELSEWHERE))
