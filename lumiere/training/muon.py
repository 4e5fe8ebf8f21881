"""Muon (Jordan et al. 2024): momentum whose update is replaced by the nearest orthogonal matrix."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn, optim

from lumiere.training.shards import apply_to_whole

# The quintic a x + b x^3 + c x^5 of the original, steepest at zero: five rounds take every singular value between
# about 0.01 and 1 to between 0.7 and 1.2, which is near enough to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(optim.Optimizer):
    """Nesterov momentum, orthogonalised; for matrices inside a network, not for embeddings.

    The same rule as `torch.optim.Muon`, which takes the matrices one by one and always in bfloat16: here matrices of
    one shape go together, and in the type that the device is fast in. Where they are shared out among processes, each
    process orthogonalises some of them.

    Args:
        parameters: matrices.
        lr: learning rate; an update of it has spectral norm about 1, times sqrt(max(1, rows / columns)).
        weight_decay: decoupled.
        momentum: decay of the mean of the gradients.
        dtype: of the orthogonalisation.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            momenta = []
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = self.state[parameter]["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                momenta.append(parameter.grad.lerp(buffer, group["momentum"]))
            orthogonalized = apply_to_whole(lambda whole: orthogonalize_each(whole, self._dtype), momenta)
            for parameter, update in zip(parameters, orthogonalized, strict=True):
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonalize_each(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`orthogonalize` of every matrix, those of one shape (or its transpose) at once, in their own order and type."""
    places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        places[min(rows, columns), max(rows, columns)].append(place)
    results = list(matrices)
    for (rows, _), here in places.items():
        # Wide, because the rounds multiply by a square matrix of the number of rows.
        wide = [matrices[place] if len(matrices[place]) == rows else matrices[place].T for place in here]
        stacked = orthogonalize(torch.stack(wide).to(dtype))
        for place, result in zip(here, stacked, strict=True):
            matrix = matrices[place]
            results[place] = (result if len(matrix) == rows else result.T).to(matrix.dtype)
    return results


def orthogonalize(matrices: Tensor) -> Tensor:
    """Roughly U V^T of each matrix U S V^T, by Newton-Schulz rounds: (count, rows, columns), rows <= columns.

    Singular values end between about 0.7 and 1.2 and need not be 1; those under a hundredth of the matrix's Frobenius
    norm end lower.
    """
    a, b, c = COEFFICIENTS
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
