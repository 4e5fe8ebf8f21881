"""Saliency against captum, laws, and functions whose attributions are known by hand."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients
from torch import Tensor

from lumiere.components.hooks import hooked, run_with_gradients
from lumiere.interpret import saliency as module
from lumiere.interpret.saliency import (
    QUADRATURES,
    Saliency,
    Score,
    gradients,
    integrated_gradients,
    metric_of,
    rank_correlation,
    saliency,
    score_at,
)
from lumiere.models.transformer import Transformer
from tests.interpret.models import TOKENS
from tests.interpret.test_architectures import build
from tests.models.build import EACH_VARIANT, VARIANTS

POSITION, TARGET, VERSUS = 7, 71, 9
MEAN, START, ZERO = np.bincount(range(3, 90), minlength=320).astype(float), np.eye(320)[0], np.zeros(320)
BASELINES: Mapping[str, np.ndarray] = {"mean": MEAN, "start": START}
DOUBLE: Mapping[str, Any] = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}


@pytest.fixture(scope="module", params=EACH_VARIANT)
def variant(request: pytest.FixtureRequest) -> Transformer:
    return build(VARIANTS[request.param])


@pytest.fixture(scope="module")
def result(variant: Transformer) -> Saliency:
    return found(variant, num_steps=32)


@pytest.fixture(scope="module")
def rotary() -> Transformer:
    return build(VARIANTS["rotary"])


def found(model: Transformer, **options: Any) -> Saliency:
    return saliency(model, TOKENS, options.pop("baselines", BASELINES), POSITION, TARGET, VERSUS, **options)


def score_of(model: Transformer) -> tuple[Score, Tensor]:
    """The logit difference as a function of the embeddings, and the text's embeddings."""
    ids = torch.tensor([TOKENS])
    return score_at(model, ids, POSITION, metric_of(TARGET, VERSUS)), model.token_embedding(ids)[0].detach()


def test_the_same_as_captum(variant: Transformer, result: Saliency) -> None:
    check_by_captum(variant, result, "gausslegendre")


def test_midpoints_are_those_of_captum(rotary: Transformer) -> None:
    check_by_captum(rotary, found(rotary, quadrature="midpoint", num_steps=16), "riemann_middle")


def check_by_captum(variant: Transformer, result: Saliency, method: str) -> None:
    """Its forward function is the whole model, with the embeddings put in by a hook."""

    def forward(embeddings: Tensor) -> Tensor:
        with hooked(variant, {"hook_embed": lambda _: embeddings}):
            logits = variant(torch.tensor([TOKENS]).expand(len(embeddings), -1)).logits[:, POSITION]
        return logits[:, TARGET] - logits[:, VERSUS]

    text = variant.token_embedding(torch.tensor([TOKENS])).detach()
    mean = variant.token_embedding.weight[3:90].mean(0).detach().expand_as(text)
    start = text[:, :1].expand_as(text)
    for values, baseline in ((result.integrated_gradients, mean), (result.other_integrated_gradients, start)):
        captum = IntegratedGradients(forward, multiply_by_inputs=True)
        expected = captum.attribute(text, baseline, n_steps=result.num_steps, method=method)
        np.testing.assert_allclose(values, expected.sum(-1)[0].detach(), atol=1e-5)
    expected = InputXGradient(forward).attribute(text.requires_grad_()).sum(-1)[0]
    np.testing.assert_allclose(result.gradient_x_input, expected.detach(), atol=1e-5)
    mask = torch.arange(len(TOKENS))[None, :, None].expand_as(text)
    dropped = FeatureAblation(forward).attribute(text, mean, feature_mask=mask)[0, :, 0]
    np.testing.assert_allclose(result.occlusion, dropped.detach(), atol=1e-5)


def test_the_gradient_is_that_of_the_activation(variant: Transformer, result: Saliency) -> None:
    """Of a tied embedding, the matrix's gradient has the output head's use too."""
    _, embeddings, slopes = run_with_gradients(
        variant,
        torch.tensor([TOKENS]),
        lambda output: output.logits[0, POSITION, TARGET] - output.logits[0, POSITION, VERSUS],
        ["hook_embed"],
    )
    expected = (embeddings["hook_embed"] * slopes["hook_embed"]).sum(-1)[0]
    np.testing.assert_allclose(result.gradient_x_input, expected, atol=1e-9)


def test_attributions_are_complete_and_later_tokens_have_none(result: Saliency) -> None:
    assert result.holds
    gap = result.score - result.baseline_score
    assert abs(result.integrated_gradients.sum() - gap) <= 0.01 * abs(gap)
    later = slice(POSITION + 1, None)
    assert not result.integrated_gradients[later].any()
    assert not result.gradient_x_input[later].any()
    assert not result.occlusion[later].any()
    assert np.abs(result.integrated_gradients[:POSITION]).max() > 1e-3


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_of_a_linear_function_any_number_of_points_is_exact(quadrature: str) -> None:
    """And from zero, integrated gradients, gradient times input and occlusion are one."""
    weight, end, start = (torch.randn(5, 3, **DOUBLE) for _ in range(3))

    def linear(embeddings: Tensor) -> Tensor:
        return torch.einsum("nte,te->n", embeddings, weight) + 7

    for steps in (1, 2, 9):
        values = integrated_gradients(linear, start, end, steps, quadrature)
        np.testing.assert_allclose(values, ((end - start) * weight).sum(-1), atol=1e-12)
        from_zero = integrated_gradients(linear, torch.zeros_like(end), end, steps, quadrature)
        np.testing.assert_allclose(from_zero, (end * gradients(linear, end[None])[0]).sum(-1), atol=1e-12)
    dropped = linear(end[None]) - torch.from_numpy(module.occluded_scores(linear, torch.zeros_like(end), end, 5))
    np.testing.assert_allclose(dropped, from_zero, atol=1e-12)


def test_of_a_product_by_hand() -> None:
    """f = a b from (0, 0) to (2, 3): each variable gets half of 6. Gauss with one point is exact up to degree 1."""
    end = torch.tensor([[2.0], [3.0]], dtype=torch.float64)

    def product(embeddings: Tensor) -> Tensor:
        return embeddings[:, 0, 0] * embeddings[:, 1, 0]

    for quadrature in QUADRATURES:
        values = integrated_gradients(product, torch.zeros_like(end), end, 1, quadrature)
        np.testing.assert_allclose(values, [3.0, 3.0])


def test_of_a_difference_it_is_the_difference(rotary: Transformer) -> None:
    ids = torch.tensor([TOKENS])
    _, end = score_of(rotary)
    start = torch.zeros_like(end) + 0.1
    both, one, other = (
        integrated_gradients(score_at(rotary, ids, POSITION, metric), start, end, 16)
        for metric in (metric_of(TARGET, VERSUS), lambda x: x[:, TARGET], lambda x: x[:, VERSUS])
    )
    np.testing.assert_allclose(both, one - other, atol=1e-10)


def test_swapping_text_and_baseline_negates_the_sum(rotary: Transformer) -> None:
    score, end = score_of(rotary)
    start = rotary.token_embedding.weight[3:90].mean(0).detach().expand_as(end)
    there, back = integrated_gradients(score, start, end, 50), integrated_gradients(score, end, start, 50)
    np.testing.assert_allclose(there, -back, atol=1e-10)


def test_only_a_changed_token_has_an_attribution(rotary: Transformer) -> None:
    score, end = score_of(rotary)
    start = end.clone()
    start[4] = rotary.token_embedding.weight[5].detach()
    values = integrated_gradients(score, start, end, 50)
    assert set(values.nonzero()[0]) == {4}
    with torch.no_grad():
        gap = float(score(end[None]) - score(start[None]))
    assert values.sum() == pytest.approx(gap, rel=0.01)


def test_a_batch_is_a_loop(rotary: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    batched = found(rotary, num_steps=4)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 1)
    looped = found(rotary, num_steps=4)
    for name, values in batched.arrays().items():
        np.testing.assert_allclose(looped.arrays()[name], values, atol=1e-10)


def test_the_points_double_until_the_error_is_small(rotary: Transformer) -> None:
    """From zero, RMSNorm turns at once, which no rule sees: the receipt fails at 256 points."""
    assert found(rotary, num_steps=2).num_steps > 2
    failed = found(rotary, baselines={"zero": ZERO, "mean": MEAN}, num_steps=3)
    assert (failed.num_steps, failed.holds) == (256, False)
    assert [receipt.holds for receipt in failed.receipts] == [False, True, True]
    assert failed.relative_error == pytest.approx(
        abs(failed.completeness_error / (failed.score - failed.baseline_score))
    )


def test_without_a_choice_the_two_most_probable_tokens(rotary: Transformer) -> None:
    with torch.no_grad():
        logits = rotary(torch.tensor([TOKENS])).logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    result = saliency(rotary, TOKENS, BASELINES)
    assert (result.position, result.target, result.versus) == (len(TOKENS) - 1, first, second)
    assert result.score == pytest.approx(float(logits[first] - logits[second]))
    assert saliency(rotary, TOKENS, BASELINES, target=second).versus == first
    log_probability = saliency(rotary, TOKENS, BASELINES, target=second, log_probability=True)
    assert log_probability.versus is None
    assert log_probability.score == pytest.approx(float(logits.log_softmax(-1)[second]))


def test_a_text_of_baselines_has_no_attributions(rotary: Transformer) -> None:
    """The change is 0, and so is its error: there is nothing to be relative to."""
    result = saliency(rotary, [0, 0, 0], {"start": START, "mean": MEAN})
    assert not result.integrated_gradients.any()
    assert result.holds
    assert np.isnan(result.rank_correlation)


def test_rank_correlation() -> None:
    """Spearman's of (1, 2, 3, 4) and (2, 1, 4, 3) is 1 - 6 x 4 / (4 x 15) = 0.6; tied ranks are halved."""
    assert rank_correlation(np.array([1.0, 2, 3, 4]), np.array([20.0, 10, 40, 30])) == pytest.approx(0.6)
    assert rank_correlation(np.array([1.0, 2, 2]), np.array([1.0, 2, 3])) == pytest.approx(np.sqrt(3) / 2)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
