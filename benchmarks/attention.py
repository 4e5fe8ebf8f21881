"""Compare the speed of two CPU attention implementations, forward and backward, with one thread and with all.

    python benchmarks/attention.py

Prints the speed of torch's `scaled_dot_product_attention` relative to batched matrix products, for float32 and
bfloat16 and several lengths: medians of the ratios of alternating rounds. `is_fused` in
`lumiere/components/kernels.py` is based on these numbers.
"""

import argparse
import os
import statistics
import time

import torch

from lumiere.components import kernels

TOKENS, HEADS, WIDTH = 2048, 4, 32
ROUNDS, WARM_UP = 25, 5


def seconds(num_positions: int, dtype: torch.dtype, is_fused: bool) -> float:
    """Return the time of a forward and backward pass over about `TOKENS` tokens."""
    shape = (max(1, TOKENS // num_positions), HEADS, num_positions, WIDTH)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, dtype=dtype)
    kernels.is_fused = lambda q_BHTK, v_BHSV: is_fused
    start = time.perf_counter()
    kernels.attention(q, k, v, WIDTH**-0.5).backward(gradient)
    return time.perf_counter() - start


def ratio(num_positions: int, dtype: torch.dtype) -> float:
    ratios = []
    for _ in range(WARM_UP + ROUNDS):
        fused, written = (seconds(num_positions, dtype, is_fused) for is_fused in (True, False))
        ratios.append(written / fused)
    return statistics.median(ratios[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[16, 64, 256, 511, 1024])
    arguments = parser.parse_args()
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            found = [f"{ratio(positions, dtype):.2f}" for positions in arguments.positions]
            print(f"{threads} threads, {str(dtype).removeprefix('torch.')}: {' / '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
