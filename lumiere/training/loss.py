"""The training objective."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lumiere.components.kernels import linear_cross_entropy
from lumiere.models.transformer import Transformer

Objective = Callable[[Transformer, torch.Tensor, torch.Tensor], torch.Tensor]
Residual = Callable[[Transformer, torch.Tensor], torch.Tensor]


def summed_loss(
    model: Transformer, tokens: torch.Tensor, targets: torch.Tensor, residual: Residual = Transformer.final_residual
) -> torch.Tensor:
    """Return the cross-entropy in nats, summed over the targets that are not padding.

    A sum, because only the step knows the number of targets to divide by: the mean of accumulated parts would weigh the
    tokens of a short part more.

    Args:
        tokens: (B, T).
        targets: (B, T), -100 at padding.
        residual: computes the final residual stream; a compiled version of it, perhaps.
    """
    final_BTE = residual(model, tokens)
    return linear_cross_entropy(final_BTE.flatten(0, 1), model.unembedding, targets.flatten())


class BatchLoss(nn.Module):
    """The loss as the forward pass of a module, which is what DDP and FSDP wrap."""

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self._objective(self.model, tokens, targets)


def compiled(warn: Callable[[str], None]) -> Objective:
    """Return `summed_loss` with the blocks compiled by `torch.compile`; fall back with a warning if that fails.

    The loss itself is not compiled: it works in chunks that stay in the cache, which a compiler would not find.

    Args:
        warn: Called once with the reason, such as a missing C++ compiler.
    """
    fast: Residual | None = None
    works = True

    def attempt(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal fast, works
        if works:
            try:
                # Torch's own random numbers give the same dropout as without a compiler.
                fast = fast or torch.compile(Transformer.final_residual, options={"fallback_random": True})
                return summed_loss(model, tokens, targets, fast)
            except Exception as error:  # torch raises many kinds, all undocumented
                works = False
                reason = str(error).strip().partition("\n")[0]
                warn(f"torch.compile does not work here, training without it: {reason}")
        return summed_loss(model, tokens, targets)

    return attempt
