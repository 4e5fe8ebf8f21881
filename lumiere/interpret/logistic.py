"""Logistic regression in float64, to the optimum: damped Newton steps, for many weights after L-BFGS.

Shapes: n examples, F features, C classes, K rows of weights: 1 for two classes, else C.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lumiere.interpret.result import Receipt

DECREMENT = 1e-12
"""Newton decrement at which a fit ends."""
GRADIENT = 1e-6
MAX_NEWTON_STEPS = 50
MANY_WEIGHTS = 1000
"""Above it, Newton steps are dear, and L-BFGS comes first."""
LEAST_SCALE = 1e-8


@dataclass(frozen=True)
class Fit:
    """A fitted classifier: `softmax(x W + b)` of standardized x, or `sigmoid` for two classes.

    Attributes:
        weights: (K, F), of standardized features.
        bias: (K,).
        mean, scale: (F,) of the training examples, by which features are standardized.
        gradient: the largest entry of the objective's gradient.
        decrement: the Newton decrement, `g^T H^-1 g / 2`: how far the objective is from its minimum.
    """

    weights: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    gradient: float
    decrement: float

    def scores(self, x_nF: Tensor) -> Tensor:
        """Return the log-probabilities of all classes up to a constant, (n, C)."""
        scores_nK = ((x_nF.double() - self.mean) / self.scale) @ self.weights.T + self.bias
        return torch.cat([torch.zeros_like(scores_nK), scores_nK], dim=1) if len(self.weights) == 1 else scores_nK

    @property
    def direction(self) -> Tensor:
        """(K, F) the weights of the features as they are, not standardized."""
        return self.weights / self.scale


def receipts(fits: list[Fit]) -> tuple[Receipt, ...]:
    """Check that fits are at their optimum."""
    return (
        Receipt("the gradient of each fit is 0", max(fit.gradient for fit in fits), GRADIENT),
        Receipt("the Newton decrement of each fit is 0", max(fit.decrement for fit in fits), DECREMENT),
    )


class Objective:
    """`mean_i c_i CE_i + penalty/2 ‖W‖²` with its gradient and Hessian; the bias is not penalized.

    Args:
        x_nF: standardized.
        y_n: classes.
        weight_n: c.
    """

    def __init__(self, x_nF: Tensor, y_n: Tensor, num_classes: int, penalty: float, weight_n: Tensor) -> None:
        self.x_nD = torch.cat([x_nF, torch.ones_like(x_nF[:, :1])], dim=1)
        self.num_rows = 1 if num_classes == 2 else num_classes
        one_hot_nC = torch.nn.functional.one_hot(y_n, num_classes).to(x_nF)
        self.y_nK = one_hot_nC[:, 1:] if self.num_rows == 1 else one_hot_nC
        self.weight_n1 = weight_n[:, None]
        self.penalty_D = torch.full((self.x_nD.shape[1],), penalty, dtype=x_nF.dtype)
        self.penalty_D[-1] = 0

    def _probabilities(self, theta_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities of the K rows, (n, K), and the loss of each example, (n, 1)."""
        scores_nK = self.x_nD @ theta_KD.T
        if self.num_rows == 1:
            return scores_nK.sigmoid(), torch.nn.functional.softplus(scores_nK) - self.y_nK * scores_nK
        log_nK = scores_nK.log_softmax(1)
        return log_nK.exp(), -(self.y_nK * log_nK).sum(1, keepdim=True)

    def value_and_gradient(self, theta_KD: Tensor) -> tuple[Tensor, Tensor]:
        p_nK, losses_n1 = self._probabilities(theta_KD)
        gradient_KD = (self.weight_n1 * (p_nK - self.y_nK)).T @ self.x_nD / len(self.x_nD) + self.penalty_D * theta_KD
        value = (self.weight_n1 * losses_n1).mean() + (self.penalty_D * theta_KD.square()).sum() / 2
        return value, gradient_KD

    def hessian(self, theta_KD: Tensor) -> Tensor:
        """Return the Hessian, (K D, K D), made definite: a common shift of all biases changes nothing."""
        p_nK, _ = self._probabilities(theta_KD)
        rows, width = theta_KD.shape
        hessian = theta_KD.new_zeros(rows, width, rows, width)
        for k in range(rows):
            for other in range(k + 1):
                curvature_n1 = p_nK[:, k : k + 1] * (float(k == other) - p_nK[:, other : other + 1]) * self.weight_n1
                block_DD = (self.x_nD * curvature_n1).T @ self.x_nD / len(self.x_nD)
                hessian[k, :, other] = block_DD
                hessian[other, :, k] = block_DD.T
            hessian[k, range(width), k, range(width)] += self.penalty_D
        if rows > 1:
            hessian[:, -1, :, -1] += 1 / rows
        return hessian.reshape(rows * width, rows * width)


@torch.no_grad()
def fit(x_nF: Tensor, y_n: Tensor, num_classes: int, penalty: float, is_balanced: bool = False) -> Fit:
    """Minimize the cross-entropy with an L2 penalty.

    `(1/n) sum_i c_i CE_i + penalty/2 ‖W‖²` over standardized features, as scikit-learn's `LogisticRegression` with
    `C = 1 / (n penalty)`.

    Args:
        x_nF: features of any type.
        y_n: classes from 0.
        is_balanced: whether each class has the same total weight, `c_i = n / (C n_class)`.
    """
    x_nF = x_nF.double()
    mean_F, scale_F = x_nF.mean(0), x_nF.std(0, correction=0).clamp(min=LEAST_SCALE)
    weight_n = torch.ones(len(y_n), dtype=torch.float64)
    if is_balanced:
        counts_C = torch.bincount(y_n, minlength=num_classes).double()
        weight_n = (len(y_n) / (num_classes * counts_C))[y_n]
    objective = Objective((x_nF - mean_F) / scale_F, y_n, num_classes, penalty, weight_n)
    theta_KD = torch.zeros(objective.num_rows, x_nF.shape[1] + 1, dtype=torch.float64)
    if theta_KD.numel() > MANY_WEIGHTS:
        optimizer = torch.optim.LBFGS([theta_KD], max_iter=100, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            value, theta_KD.grad = objective.value_and_gradient(theta_KD)
            return value

        optimizer.step(closure)
    decrement = torch.inf
    for _ in range(MAX_NEWTON_STEPS):
        value, gradient_KD = objective.value_and_gradient(theta_KD)
        factor = torch.linalg.cholesky(objective.hessian(theta_KD))
        step_KD = torch.cholesky_solve(gradient_KD.flatten()[:, None], factor).view_as(theta_KD)
        decrement = float((gradient_KD * step_KD).sum() / 2)
        if decrement <= DECREMENT:
            theta_KD = theta_KD - step_KD  # once more, at the price of nothing: the error squares
            break
        # The objective must fall by a quarter of what a straight line promises (Armijo).
        size = 1.0
        while size > 1e-6 and objective.value_and_gradient(theta_KD - size * step_KD)[0] > value - size * decrement / 2:
            size /= 2
        theta_KD = theta_KD - size * step_KD
    gradient = float(objective.value_and_gradient(theta_KD)[1].abs().max())
    return Fit(theta_KD[:, :-1], theta_KD[:, -1], mean_F, scale_F, gradient, decrement)
