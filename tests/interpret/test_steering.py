"""Steering against the norm and the unembedding computed by hand, means by hand, and least squares."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumiere.components.hooks import run_with_cache
from lumiere.errors import LumiereError
from lumiere.interpret.steering import DOSES, Sets, mean_norms, placebos, slopes, steer, text_means
from lumiere.models.transformer import Transformer
from tests.interpret.models import BATCHES, TOKENS, exact, random_model

PROMPTS = [TOKENS[:size] for size in range(2, 10)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return exact(random_model())


def test_after_the_last_block_the_change_is_that_of_the_final_norm(model: Transformer) -> None:
    vector_E = torch.linspace(-1, 2, 12, dtype=torch.float64)
    result = steer(model, vector_E, 2, PROMPTS, target=71, versus=9, batches=BATCHES)
    assert result.holds
    unit = float(mean_norms(model, BATCHES)[2])
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            stream_E = model(torch.tensor([prompt])).hidden_states[0, -1, -1]
            for column, dose in enumerate(DOSES):
                steered_E = stream_E + dose * unit * vector_E / vector_E.norm()
                scale = (steered_E.square().mean() + 1e-6).sqrt()
                logits_V = model.unembedding @ (steered_E / scale * model.final_norm.weight)
                plain_V = model.logits(torch.tensor([prompt]))[0, -1]
                expected = (logits_V[71] - logits_V[9]) - (plain_V[71] - plain_V[9])
                assert result.effects[row, column] == pytest.approx(float(expected), abs=1e-9)


def test_the_norms_and_the_loss_are_those_of_the_batches(model: Transformer) -> None:
    result = steer(model, torch.ones(12), 1, PROMPTS[:1], 71, batches=BATCHES)
    norms, losses = [], []
    with torch.no_grad():
        for batch in BATCHES:
            output = model(batch.tokens)
            real = batch.is_real.clone()
            real[:, 0] = False
            norms += output.hidden_states[:, 2][real].norm(dim=-1).tolist()
            losses += F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten(), reduction="none")[
                batch.targets.flatten() >= 0
            ].tolist()
    assert result.stream_norm == pytest.approx(np.mean(norms))
    assert result.losses[DOSES.index(0.0)] == pytest.approx(np.mean(losses))
    assert np.isnan(result.low).all()  # one prompt
    assert np.isnan(steer(model, torch.ones(12), 1, PROMPTS[:1], 71, norms_L=torch.ones(3)).losses).all()


@pytest.mark.parametrize("layer", [1, 2])
def test_the_unembedding_of_a_token_writes_it(layer: int) -> None:
    model = random_model(scale=5)
    row_E = model.readout()[0][71]
    result = steer(model, row_E, layer, PROMPTS, 71, batches=BATCHES)
    assert result.ranks == {"random": 1}
    assert 0 < result.slope_low < result.slope < result.slope_high
    assert result.wrong_sign == 0
    turned = steer(model, -row_E, layer, PROMPTS, 71, batches=BATCHES)
    np.testing.assert_allclose(turned.means, result.means[::-1], atol=1e-5)


def test_means_of_texts_leave_out_the_start_token(model: Transformer) -> None:
    means_NLE = text_means(model, [TOKENS, TOKENS[:4]])
    with torch.no_grad():
        _, cache = run_with_cache(model, torch.tensor([TOKENS[:4]]), ["blocks.1.hook_resid_post"])
    torch.testing.assert_close(means_NLE[1, 1], cache["blocks.1.hook_resid_post"][0, 1:].mean(0))
    sets = Sets(means_NLE[:1, 0], means_NLE[1:, 0])
    torch.testing.assert_close(sets.difference, means_NLE[0, 0] - means_NLE[1, 0])


def test_placebos_have_the_norm_of_the_direction() -> None:
    torch.manual_seed(0)
    sets = Sets(torch.randn(7, 5).double() + 1, torch.randn(6, 5).double())
    drawn = placebos(sets.difference, 30, 0, sets)
    assert list(drawn) == ["random", "shuffled", "halves"]
    for rows_RE in drawn.values():
        assert rows_RE.shape == (30, 5)
        torch.testing.assert_close(rows_RE.norm(dim=1), sets.difference.norm().expand(30))
        assert len({tuple(row) for row in rows_RE.tolist()}) > 20
    assert list(placebos(sets.difference, 3, 0, Sets(sets.positive[:3], sets.negative))) == ["random"]
    # Halves of a set that varies along one axis only point along it.
    line = Sets(torch.arange(8.0).double()[:, None] * torch.tensor([1.0, 0]), torch.zeros(8, 2).double())
    along = placebos(line.difference, 4, 0, line)["halves"][0]
    assert abs(float(along[1])) < 1e-12


def test_the_slope_is_that_of_least_squares() -> None:
    doses = np.array(DOSES)
    effects = np.stack([3 * doses, doses**2, np.sin(doses)])
    small = abs(doses) <= 0.1
    expected = [np.linalg.lstsq(doses[small, None], row[small], rcond=None)[0][0] for row in effects]
    np.testing.assert_allclose(slopes(doses, effects), expected, atol=1e-12)
    assert expected[0] == pytest.approx(3)


@pytest.mark.parametrize("vector_E", [torch.ones(11), torch.zeros(12)], ids=["another width", "zero"])
def test_no_direction_of_the_model_is_refused(model: Transformer, vector_E: torch.Tensor) -> None:
    with pytest.raises(LumiereError):
        steer(model, vector_E, 1, PROMPTS, 71, batches=BATCHES)
    assert math.isfinite(steer(model, torch.ones(12), 1, PROMPTS, 71, batches=BATCHES).slope)
