"""The training objective."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lumiere.data.batches import IGNORED
from lumiere.models.transformer import Transformer

Objective = Callable[[Transformer, torch.Tensor, torch.Tensor], torch.Tensor]


def summed_loss(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over the targets that are no padding.

    A sum, because only the step knows the number of targets to divide by: the mean of accumulated parts would
    weigh a short part's tokens more.

    Args:
        tokens: (B, T).
        targets: (B, T), `IGNORED` where there is nothing to predict.
    """
    logits = model.logits(tokens).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def compiled(objective: Objective, warn: Callable[[str], None]) -> Objective:
    """`objective` through `torch.compile`; where that fails, as without a C++ compiler, it says so and goes on."""
    fast: Objective | None = None
    works = True

    def attempt(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal fast, works
        if works:
            try:
                fast = fast or torch.compile(objective)
                return fast(model, tokens, targets)
            except Exception as error:  # torch raises many kinds, none of them documented
                works = False
                reason = str(error).strip().partition("\n")[0]
                warn(f"torch.compile does not work here, training goes on without it: {reason}")
        return objective(model, tokens, targets)

    return attempt
