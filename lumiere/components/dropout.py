"""Dropout (Srivastava et al. 2014): while training, each number is zero with probability `share`, or else grows."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

COINS_A_WORD = 4  # of 16 bits each


class Dropout(nn.Module):
    """`x` with a share of its numbers at zero and the others divided by `1 - share`; `x` itself in evaluation.

    On a CPU the coins are tossed with 16 bits each, in a tenth of the time that torch takes, so the probability is
    `share` rounded to a multiple of 2^-16. Their seed is a number of torch's generator, whose seed repeats them.

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
    """What dropout multiplies `x` by: of its shape and type, 0 with probability `share`, else `1 / (1 - share)`.

    Args:
        share: more than 0 and less than 1.
    """
    seed = torch.randint(2**63 - 1, ())
    if torch.compiler.is_compiling():
        return factors_op(seed, x.shape, share, x.dtype)
    return factors(seed, x.shape, share, x.dtype)


def factors(seed: Tensor, shape: Sequence[int], share: float, dtype: torch.dtype) -> Tensor:
    """`kept` for a shape, a type and a seed.

    The random words are those of SFC64 (Doty-Humphrey's PractRand), twice as fast as torch's generator on a CPU.
    """
    numel = math.prod(shape)
    words = np.random.SFC64(int(seed)).random_raw(numel // COINS_A_WORD + 1)
    coins = torch.from_numpy(words.view(np.int16))[:numel].view(shape)
    first_kept = min(max(round(share * 2**16), 1), 2**16 - 1) - 2**15
    # Whole numbers of 0 and 1, because booleans are slow to make and slower to convert.
    is_kept = coins.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1)
    return is_kept.to(dtype).mul_(1.0 / (1.0 - share))


# What a compiler calls: it would lose its way in numpy, and makes slow code of numbers of 16 bits.
factors_op = library.custom_op("lumiere::dropout_factors", factors, mutates_args=(), device_types="cpu")


@factors_op.register_fake
def _(seed: Tensor, shape: Sequence[int], share: float, dtype: torch.dtype) -> Tensor:
    return seed.new_empty(shape, dtype=dtype)
