"""Dropout (Srivastava et al. 2014): while training, each number is zero with probability `share`, or else grows."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    num_words = x.numel() // COINS_A_WORD + 1
    # A compiler that looked into numpy would lose its way; the operation that it calls is the same function.
    words = random_words_op(seed, num_words) if torch.compiler.is_compiling() else random_words(seed, num_words)
    coins = words.view(torch.int16)[: x.numel()].view(x.shape)
    first_kept = min(max(round(share * 2**16), 1), 2**16 - 1) - 2**15
    # Whole numbers of 0 and 1, because booleans are slow to make and slower to convert.
    is_kept = coins.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1)
    return is_kept.to(x.dtype).mul_(1.0 / (1.0 - share))


def random_words(seed: Tensor, num_words: int) -> Tensor:
    """Random int64 by the generator SFC64 (Doty-Humphrey's PractRand), twice as fast as torch's on a CPU."""
    return torch.from_numpy(np.random.SFC64(int(seed)).random_raw(num_words).view(np.int64))


random_words_op = torch.library.custom_op("lumiere::random_words", random_words, mutates_args=(), device_types="cpu")


@random_words_op.register_fake
def _(seed: Tensor, num_words: int) -> Tensor:
    return seed.new_empty(num_words, dtype=torch.int64)
