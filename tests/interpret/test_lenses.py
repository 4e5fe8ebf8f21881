"""Fitted lenses against autograd, a product of matrices, and the lens that they start from."""

from typing import Any

import numpy as np
import pytest
import torch

from lumiere.components.hooks import hooked
from lumiere.interpret import lenses as module
from lumiere.interpret.lenses import (
    Lens,
    compare_lenses,
    jacobian_lens,
    jacobians,
    plain_lens,
    read_positions,
    read_streams,
    set_gradients,
    stage_names,
    statistics,
    train_tuned,
)
from lumiere.interpret.logit_lens import logit_lens
from lumiere.models.transformer import Transformer
from tests.interpret.models import TOKENS, random_model
from tests.interpret.test_architectures import build
from tests.models.build import VARIANTS

TEXTS = torch.randint(3, 300, (24, 12), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 300, (6, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def small() -> Transformer:
    return random_model(num_layers=2).double()


def noisy_lens(model: Transformer) -> Lens:
    lens, generator = plain_lens(model), torch.Generator().manual_seed(2)
    for weight in (lens.matrices, lens.offsets):
        weight += 0.05 * torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
    return lens


def test_an_untrained_lens_is_the_logit_lens(small: Transformer) -> None:
    plain = logit_lens(small, TOKENS, top_k=3)
    for kind in ("tuned", "bias"):
        read = logit_lens(small, TOKENS, top_k=3, lens=plain_lens(small, kind))
        for name, values in read.arrays().items():
            np.testing.assert_array_equal(values, plain.arrays()[name])
    identity = Lens("jacobian", torch.eye(12).expand(2, 12, 12), torch.zeros(2, 12))
    found = logit_lens(small, TOKENS, lens=identity)
    np.testing.assert_allclose(found.entropies, plain.entropies, atol=1e-12)


def test_the_gradient_of_the_divergence_is_that_of_autograd(small: Transformer) -> None:
    """For each stage of its own; the model gets none."""
    full, bias = noisy_lens(small), plain_lens(small, "bias")
    set_gradients(small, TEXTS, full, bias, torch.Generator())
    streams = read_streams(small, TEXTS)
    final = small.unembed(small.final_norm(streams[-1])).softmax(-1).detach()
    for stage, resid in enumerate(streams[:-1]):
        matrix, offset = (weight[stage].clone().requires_grad_() for weight in (full.matrices, full.offsets))
        read = small.unembed(small.final_norm(resid + resid @ matrix + offset)).log_softmax(-1)
        loss = torch.nn.functional.kl_div(read, final, reduction="none").sum(-1).mean()
        for weight, expected in zip(
            (full.matrices, full.offsets), torch.autograd.grad(loss, (matrix, offset)), strict=True
        ):
            assert weight.grad is not None
            torch.testing.assert_close(weight.grad[stage], expected)
    assert all(parameter.grad is None for parameter in small.parameters())


def test_training_lowers_the_held_out_divergence(small: Transformer) -> None:
    """And ends where it no longer falls; the same seed gives the same lens."""
    before = {name: weight.clone() for name, weight in small.state_dict().items()}
    found = train_tuned(small, TEXTS, HELD_OUT, steps=10, learning_rate=6e-2)
    start, end = found.curve[0], min(found.curve, key=lambda point: point[1])
    assert end[1] < 0.9 * start[1]
    assert min(point[2] for point in found.curve) < start[2]
    result = compare_lenses(small, HELD_OUT, {"bias": found.bias, "tuned": found.lens})
    assert result.holds
    assert result.divergences[2, :-1].mean() == pytest.approx(end[1])
    assert not found.bias.matrices.any()
    again = train_tuned(small, TEXTS, HELD_OUT, steps=10, learning_rate=6e-2)
    assert torch.equal(again.lens.matrices, found.lens.matrices)
    assert all(torch.equal(weight, before[name]) for name, weight in small.state_dict().items())
    diverging = train_tuned(small, TEXTS, HELD_OUT, steps=30, learning_rate=1e3)
    assert diverging.steps < 30
    assert not diverging.lens.matrices.any()  # the best was the logit lens


@pytest.mark.parametrize("variant", ["card", "gpt neox", "grouped queries", "attention only"])
def test_jacobians_by_brute_force(variant: str) -> None:
    """The whole Jacobian of the last stream in each stage, averaged over its blocks."""
    model, tokens = build(VARIANTS[variant]), torch.tensor([TOKENS])
    found, places = jacobians(model, tokens), list(read_positions(len(TOKENS)))
    assert torch.equal(found[-1], torch.eye(12, dtype=torch.float64))
    streams = read_streams(model, tokens)
    for layer in range(model.num_layers):

        def last(resid: torch.Tensor, layer: int = layer) -> torch.Tensor:
            kept: list[torch.Tensor] = []
            with torch.enable_grad(), hooked(model, {stage_names(model, sublayers=False)[-1]: kept.append}):
                model.continue_from(resid, layer)
            return kept[0]

        found_all: Any = torch.autograd.functional.jacobian(last, streams[layer])
        whole: torch.Tensor = found_all[0, :, :, 0]  # (T', E', T, E)
        assert not any(whole[after, :, before].any() for before in places for after in range(before))  # causality
        expected = sum(whole[after, :, before] for before in places for after in places) / len(places)
        torch.testing.assert_close(found[layer], expected)


def test_without_writes_the_jacobian_is_the_identity() -> None:
    model = build(VARIANTS["attention only"])
    for block in model.blocks:
        block.attention.value.weight.data.zero_()
    found = jacobian_lens(model, HELD_OUT)
    torch.testing.assert_close(found.matrices, torch.eye(12, dtype=torch.float64).expand(2, 12, 12))


def test_the_scale_of_a_jacobian_changes_no_rank(small: Transformer) -> None:
    lens = jacobian_lens(small, HELD_OUT)
    louder = Lens("jacobian", 3 * lens.matrices, lens.offsets)
    np.testing.assert_array_equal(statistics(small, HELD_OUT, louder)[2], statistics(small, HELD_OUT, lens)[2])


def test_texts_count_equally_and_parts_change_nothing(small: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jacobians(small, HELD_OUT)
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 4)
    torch.testing.assert_close(jacobians(small, HELD_OUT), whole)
    torch.testing.assert_close(torch.stack([jacobians(small, row[None]) for row in HELD_OUT]).mean(0), whole)
    frozen = random_model(num_layers=2).double().requires_grad_(False)
    torch.testing.assert_close(jacobians(frozen, HELD_OUT), whole)


def test_statistics_are_those_of_the_logit_lens(small: Transformer) -> None:
    """Of each text's own lens, whose rank of the final top token is asked for."""
    divergence, agreement, _ = statistics(small, torch.tensor([TOKENS]), noisy_lens(small))
    read = logit_lens(small, TOKENS, lens=noisy_lens(small))
    np.testing.assert_allclose(divergence, read.divergences.mean(-1), atol=1e-10)
    np.testing.assert_allclose(agreement, (read.top_tokens[..., 0] == read.top_tokens[-1, :, 0]).mean(-1))
