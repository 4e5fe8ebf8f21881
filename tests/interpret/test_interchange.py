"""Interchange interventions on a model whose subspace is known."""

from typing import Any

import numpy as np
import pytest
import torch

from lumiere.interpret.interchange import (
    DAS,
    FULL,
    MEANS,
    PLAIN,
    RANDOM,
    Interchange,
    InterchangePairs,
    Site,
    interchange,
    random_subspace,
)
from lumiere.models.transformer import Transformer

ANSWERS, CLUTTER = 2, 8


def copier() -> Transformer:
    """Predicts token 0 or 1: the side of the last token on axis 0; the other axes carry clutter that no one reads."""
    model = Transformer(
        vocab_size=2 + 2 * CLUTTER, embedding_size=12, context_size=3, num_layers=2, num_heads=1, d_key=2, d_value=2,
        d_ff=2, tie_embeddings=False, positions="none",
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        generator = torch.Generator().manual_seed(0)
        clutter = torch.randn(CLUTTER, 12, generator=generator, dtype=torch.float64)
        for number in range(CLUTTER):
            for side in (0, 1):
                row = model.token_embedding.weight[2 + 2 * number + side]
                row.copy_(clutter[number])
                row[0] = 2.0 * side - 1.0
        assert model.output_head is not None
        model.output_head.weight[0, 0], model.output_head.weight[1, 0] = -5.0, 5.0
    return model


@pytest.fixture(scope="module")
def pairs() -> InterchangePairs:
    tokens = torch.randint(2, 2 + 2 * CLUTTER, (2, 64, 3), generator=torch.Generator().manual_seed(1))
    return InterchangePairs(tokens[0], tokens[1], tokens[1, :, -1] % 2)


@pytest.fixture(scope="module")
def result(pairs: InterchangePairs) -> Interchange:
    return interchange(copier(), pairs, 0, rank=1, steps=60, seeds=range(5))


def of(result: Interchange, name: str) -> np.ndarray:
    return result.accuracies[result.methods.index(name)]


def test_the_subspace_of_the_copier_is_found(result: Interchange) -> None:
    assert result.holds
    assert (of(result, FULL) == 1).all()
    assert (of(result, DAS) == 1).all()
    assert of(result, PLAIN).mean() == pytest.approx(0.5, abs=0.15)
    assert of(result, RANDOM).mean() < 0.75
    assert of(result, MEANS).mean() > 0.75
    assert of(result, "DAS, arbitrary labels").mean() < 0.85
    assert len(list(result.rows())) == len(result.methods) * 5


def test_its_direction_is_the_axis(pairs: InterchangePairs) -> None:
    """Known from the construction: one axis gives 1, any orthogonal one changes nothing."""
    answers, classes = pairs.labels.unique(return_inverse=True)
    site, rows = Site(copier(), pairs, 0, (-1, -1), answers), torch.arange(64)
    found = site.fit(rows, classes, 1, 150, 0)
    assert abs(float(found[0, 0])) > 0.9
    axis = torch.eye(12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(site.answer_logits(rows, axis[:, :1]).argmax(-1), classes)
        base = pairs.base[:, -1] % 2
        assert torch.equal(site.answer_logits(rows, axis[:, 1:2]).argmax(-1), base)


def test_laws_of_the_intervention(pairs: InterchangePairs) -> None:
    model = copier()
    site, rows = Site(model, pairs, 0, (-1, -1), torch.tensor([0, 1])), torch.arange(64)
    same = Site(model, InterchangePairs(pairs.base, pairs.base, pairs.labels), 0, (-1, -1), torch.tensor([0, 1]))
    subspace = random_subspace(site.base_NTE, 3, 5)
    turned = subspace @ random_subspace(torch.zeros(1, 3, dtype=torch.float64), 3, 6)
    with torch.no_grad():
        plain = model.logits(pairs.base)[:, -1, :2]
        assert torch.equal(site.answer_logits(rows, subspace[:, :0]), plain)
        torch.testing.assert_close(same.answer_logits(rows, subspace), plain)
        torch.testing.assert_close(site.answer_logits(rows, turned), site.answer_logits(rows, subspace))
        whole = site.answer_logits(rows, random_subspace(site.base_NTE, 12, 7))
        torch.testing.assert_close(whole, site.answer_logits(rows, None))
        torch.testing.assert_close(whole, model.logits(pairs.source)[:, -1, :2])  # the last token alone decides
    torch.testing.assert_close(subspace.T @ subspace, torch.eye(3, dtype=torch.float64))


def test_untrained_weights_are_fitted_too(pairs: InterchangePairs) -> None:
    options: dict[str, Any] = {"steps": 5, "seeds": range(2)}
    blank = copier()
    assert blank.output_head is not None
    blank.output_head.weight.data.zero_()
    found = interchange(copier(), pairs, 0, untrained=lambda: blank, **options)
    assert of(found, "DAS, untrained weights").mean() == pytest.approx(0.5, abs=0.2)
