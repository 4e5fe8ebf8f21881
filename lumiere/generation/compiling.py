"""The step of the cache through `torch.compile`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lumiere.generation.cached import KeysAndValues, StepRows, step_rows
from lumiere.generation.folding import Folded


def compiled_step(warn: Callable[[str], None] | None = None) -> StepRows:
    """`step_rows` compiled; where that fails, it says so and goes on without.

    Args:
        warn: called with the reason, once: no C++ compiler, for example.
    """
    fast: StepRows | None = None
    works = True

    def step(
        folded: Folded, caches: Sequence[KeysAndValues], tokens_B: Tensor, lengths_B: Tensor, columns: int
    ) -> Tensor:
        nonlocal fast, works
        if works:
            try:
                fast = fast or torch.compile(step_rows, dynamic=False)
                return fast(folded, caches, tokens_B, lengths_B, columns)
            except Exception as error:  # torch raises many kinds, none of them documented
                works = False
                if warn is not None:
                    reason = str(error).strip().partition("\n")[0]
                    warn(f"torch.compile does not work here, generation goes on without it: {reason}")
        # A step that failed half-way has written nothing to the caches that this does not write again.
        return step_rows(folded, caches, tokens_B, lengths_B, columns)

    return step
