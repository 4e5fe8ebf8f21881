"""Cross-entropy of a linear layer's outputs, in chunks of rows, so that the logits never exist all at once.

At 2,048 tokens and 4,096 words, the logits and their gradient are 33 MB each: more than a CPU's cache, and written and
read several times. Here a chunk of logits becomes loss and gradients while it is in the cache, in the forward pass:
nothing is computed twice, and the backward only scales what is there. The idea is that of Liger-Kernel (Hsu et al.
2024, arXiv:2410.10989, section 3.2).

Shapes: N rows (tokens), M rows of one chunk, E embedding_size, Vocab vocab_size.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The target of a row that has no loss, as in `torch.nn.functional.cross_entropy`."""

# Logits of one chunk: 8 MB in float32 on a CPU, where smaller ones make the products slower and larger ones leave the
# cache; accelerators want larger products. With a large vocabulary there are still some hundred rows: every chunk adds
# a gradient of the weight's size, which for a few rows takes longer than the products.
CHUNK_LOGITS = {"cpu": 2**21}
CHUNK_LOGITS_ELSEWHERE = 2**26
MIN_CHUNK_ROWS = 512

MAX_SUM = 2.0**64
"""Where the sum of a row's powers is outside 1 / MAX_SUM to MAX_SUM, they are computed again less the row's maximum.

Float32 keeps 24 bits from 2^-126 to 2^128. The sums must stay far inside that range, because the powers and the inverse
of their sum multiply other numbers: below 2^-126 digits are lost, and bfloat16 products on AMX flush to zero. With this
limit, what is lost is at most 2^-62 of a row's sum.
"""

# Powers of 2 are three times as fast to compute as powers of e, so the logits are made in bits.
BITS_A_NAT = math.log2(math.e)


def linear_cross_entropy(x_NE: Tensor, weight_VocabE: Tensor, targets_N: Tensor) -> Tensor:
    """The summed cross-entropy, in nats, of the logits `x @ weight.T`; differentiable once.

    Under `torch.autocast` the products are in its type. Sums over words and over rows are in float32 or wider.

    Args:
        x_NE: what the linear layer reads.
        weight_VocabE: its weight.
        targets_N: the right word's row, or `IGNORED`.

    Returns:
        One number, as `cross_entropy(x @ weight.T, targets, reduction="sum")`.
    """
    return _LinearCrossEntropy.apply(x_NE, weight_VocabE, targets_N)


@torch.no_grad()
def linear_cross_entropy_losses(x_NE: Tensor, weight_VocabE: Tensor, targets_N: Tensor) -> Tensor:
    """Each row's cross-entropy in nats, (N,), zero where the target is `IGNORED`; without gradients, for evaluation."""
    chunks = chunks_of_powers(x_NE * BITS_A_NAT, weight_VocabE, *rows_of(targets_N))
    losses = [chunk.losses * chunk.is_real for chunk in chunks]
    return torch.cat(losses).squeeze(1)


class Chunk(NamedTuple):
    """Some rows, and what comes of their logits."""

    x: Tensor
    """(M, E), times `BITS_A_NAT`."""
    rows: Tensor
    """(M, 1), from `rows_of`."""
    is_real: Tensor
    """(M, 1)."""
    losses: Tensor
    """(M, 1), in nats; any number where the row is not real."""
    powers: Tensor
    """(M, Vocab): the probabilities, but for a factor of each row; valid until the next chunk is asked for."""
    sums: Tensor
    """(M, 1), of the powers: that factor."""


def rows_of(targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The target's row in the table, (N, 1), any where there is none; and whether there is one, (N, 1)."""
    is_real_N1 = (targets_N != IGNORED).unsqueeze(1)
    return targets_N.unsqueeze(1) * is_real_N1, is_real_N1


def chunks_of_powers(x_NE: Tensor, weight_VocabE: Tensor, rows_N1: Tensor, is_real_N1: Tensor) -> Iterator[Chunk]:
    """The rows in chunks, each one's logits in the same piece of memory.

    Args:
        x_NE: times `BITS_A_NAT`.
    """
    is_cpu = x_NE.device.type == "cpu"
    limit = CHUNK_LOGITS.get(x_NE.device.type, CHUNK_LOGITS_ELSEWHERE)
    size = max(MIN_CHUNK_ROWS, limit // len(weight_VocabE))
    memory = x_NE.new_empty(min(size, len(x_NE)), len(weight_VocabE))
    for x_ME, rows_M1, is_real_M1 in zip(*(tensor.split(size) for tensor in (x_NE, rows_N1, is_real_N1)), strict=True):
        logits = torch.mm(x_ME, weight_VocabE.T, out=memory[: len(x_ME)])
        sums_M1, losses_M1 = exponentiate_(logits, rows_M1, subtracts_max=not is_cpu)
        # Logits that need their maximum subtracted are so rare that checking the sums is cheaper than two more passes
        # over all logits; on an accelerator a check would make the host wait.
        if is_cpu and not ((sums_M1 > 1 / MAX_SUM) & (sums_M1 < MAX_SUM)).all():  # NaN fails as well
            highest_M1 = torch.mm(x_ME, weight_VocabE.T, out=logits).amax(1, keepdim=True)
            # Subtract inside the product, before it is rounded: at 130 bits, bfloat16 has steps of 1. That maximum is
            # rounded too, so `exponentiate_` subtracts what is left of it.
            torch.addmm(-highest_M1, x_ME, weight_VocabE.T, out=logits)
            sums_M1, losses_M1 = exponentiate_(logits, rows_M1, subtracts_max=True)
        yield Chunk(x_ME, rows_M1, is_real_M1, losses_M1, logits, sums_M1)


def exponentiate_(logits_MV: Tensor, rows_M1: Tensor, subtracts_max: bool) -> tuple[Tensor, Tensor]:
    """Replace logits in bits by powers of 2; return each row's sum of them, and its loss in nats: (M, 1) each."""
    target_bits_M1 = logits_MV.gather(1, rows_M1)
    shift_M1 = logits_MV.amax(1, keepdim=True) if subtracts_max else 0.0
    if subtracts_max:
        logits_MV.sub_(shift_M1)
    sums_M1 = logits_MV.exp2_().sum(1, keepdim=True, dtype=torch.promote_types(logits_MV.dtype, torch.float32))
    return sums_M1, (sums_M1.log2() + shift_M1 - target_bits_M1) / BITS_A_NAT


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, weight_VocabE: Tensor, targets_N: Tensor) -> Tensor:
        ctx.dtypes = (x_NE.dtype, weight_VocabE.dtype)
        device = x_NE.device.type
        x_NE = x_NE * BITS_A_NAT  # before it is rounded
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_NE, weight_VocabE = x_NE.to(dtype), weight_VocabE.to(dtype)
        sum_dtype = torch.promote_types(x_NE.dtype, torch.float32)
        gradients_ME: list[Tensor] = []
        gradient_VocabE = torch.zeros(weight_VocabE.shape, dtype=sum_dtype, device=x_NE.device)
        # Buffers for the products of a chunk, where their type is not that of the sums.
        memory = (
            None if x_NE.dtype == sum_dtype else (torch.empty_like(weight_VocabE), torch.empty_like(gradient_VocabE))
        )
        loss = torch.zeros((), dtype=sum_dtype, device=x_NE.device)
        with torch.autocast(device, enabled=False):
            for chunk in chunks_of_powers(x_NE, weight_VocabE, *rows_of(targets_N)):
                loss += (chunk.losses * chunk.is_real).sum()
                # The gradient by the logits is the probabilities, powers / sums, less 1 at the target. The subtraction
                # is done in the type of the sums, because near 1 bfloat16 has too few digits; the division outside of
                # the products, because dividing the powers would be another pass over the logits.
                # Not `scatter_`, which copies all of a bfloat16 tensor to float32 and back.
                gradient = chunk.powers
                targets = (torch.arange(len(gradient), device=x_NE.device).unsqueeze(1), chunk.rows)
                gradient[targets] = (gradient[targets] - chunk.sums).to(x_NE.dtype)
                share_M1 = (chunk.is_real / chunk.sums).to(x_NE.dtype)
                gradients_ME.append((gradient @ weight_VocabE).mul_(share_M1))
                x_ME = chunk.x * (share_M1 / BITS_A_NAT)
                if memory is None:
                    gradient_VocabE.addmm_(gradient.T, x_ME)
                else:
                    # Convert, then add: adding one type to another is slower than both.
                    product_VocabE, widened_VocabE = memory
                    widened_VocabE.copy_(torch.mm(gradient.T, x_ME, out=product_VocabE))
                    gradient_VocabE += widened_VocabE
        ctx.save_for_backward(torch.cat(gradients_ME), gradient_VocabE)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient_NE, gradient_VocabE = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        return (gradient_NE * gradient).to(x_dtype), (gradient_VocabE * gradient).to(weight_dtype), None
