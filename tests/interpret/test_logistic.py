"""Logistic regression against scikit-learn, and laws of its optimum."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lumiere.interpret import logistic
from lumiere.interpret.logistic import Fit, fit, receipts


def examples(num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of different scales, one of them constant, and noisy classes of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x_nF = torch.randn(300, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 1, 1, 0]).double()
    x_nF[:, 3] += x_nF[:, 0]
    scores_nC = torch.stack([x_nF[:, k] + 0.2 * x_nF[:, (k + 1) % 5] for k in range(num_classes)], dim=1)
    noise = torch.randn(scores_nC.shape, generator=generator, dtype=torch.float64)
    return x_nF, (scores_nC + 2 * noise + torch.arange(num_classes)).argmax(1)


def standardized(x_nF: torch.Tensor) -> np.ndarray:
    return ((x_nF - x_nF.mean(0)) / x_nF.std(0, correction=0).clamp(min=1e-8)).numpy()


@pytest.mark.parametrize("is_balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_weights_are_those_of_scikit_learn(num_classes: int, penalty: float, is_balanced: bool) -> None:
    x_nF, y_n = examples(num_classes)
    found = fit(x_nF, y_n, num_classes, penalty, is_balanced)
    peer = LogisticRegression(
        C=1 / (len(y_n) * penalty), tol=1e-12, max_iter=10_000, class_weight="balanced" if is_balanced else None
    ).fit(standardized(x_nF), y_n.numpy())
    np.testing.assert_allclose(found.weights.numpy(), peer.coef_, atol=1e-6)
    shift = found.bias.mean() if num_classes > 2 else 0  # a common shift of all biases changes nothing
    expected = peer.intercept_ - (peer.intercept_.mean() if num_classes > 2 else 0)
    np.testing.assert_allclose((found.bias - shift).numpy(), expected, atol=1e-6)
    probabilities = found.scores(x_nF).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, peer.predict_proba(standardized(x_nF)), atol=1e-6)
    assert all(receipt.holds for receipt in receipts([found]))


def test_many_weights_begin_with_lbfgs(monkeypatch: pytest.MonkeyPatch) -> None:
    x_nF, y_n = examples(4)
    found = fit(x_nF, y_n, 4, 1e-3)
    monkeypatch.setattr(logistic, "MANY_WEIGHTS", 0)
    torch.testing.assert_close(fit(x_nF, y_n, 4, 1e-3).weights, found.weights, atol=1e-8, rtol=0)


def test_other_labels_negate_the_weights_and_copies_change_nothing() -> None:
    x_nF, y_n = examples(2)
    found, flipped = fit(x_nF, y_n, 2, 1e-2), fit(x_nF, 1 - y_n, 2, 1e-2)
    torch.testing.assert_close(flipped.weights, -found.weights)
    torch.testing.assert_close(flipped.bias, -found.bias)
    torch.testing.assert_close(fit(x_nF.repeat(3, 1), y_n.repeat(3), 2, 1e-2).weights, found.weights)
    torch.testing.assert_close(fit(7 * x_nF + 5, y_n, 2, 1e-2).direction[:, :5] * 7, found.direction[:, :5])


@pytest.mark.parametrize("num_classes", [2, 4])
def test_with_a_large_penalty_only_the_shares_of_the_classes_are_left(num_classes: int) -> None:
    x_nF, y_n = examples(num_classes)
    shares = torch.bincount(y_n) / len(y_n)
    predicted = fit(x_nF, y_n, num_classes, 1e9).scores(x_nF).softmax(1)
    torch.testing.assert_close(predicted[0], shares.double(), atol=1e-6, rtol=0)
    even = fit(x_nF, y_n, num_classes, 1e9, is_balanced=True).scores(x_nF).softmax(1)
    torch.testing.assert_close(even[0], torch.full((num_classes,), 1 / num_classes).double(), atol=1e-6, rtol=0)


def test_classes_without_overlap_are_told_apart() -> None:
    x_nF, _ = examples(2)
    y_n = (x_nF[:, 1] > 0.3).long()
    found = fit(x_nF, y_n, 2, 1e-8)
    assert torch.equal(found.scores(x_nF).argmax(1), y_n)
    assert found.weights.abs().argmax() == 1
    unfinished = Fit(found.weights, found.bias, found.mean, found.scale, 1e-3, 1e-3)
    assert not any(receipt.holds for receipt in receipts([found, unfinished]))
