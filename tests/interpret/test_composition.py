"""Composition of heads: from whole matrices, on a circuit built by hand, and on random weights."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from lumiere.config.loader import validate
from lumiere.interpret.head_scores import composition_scores, pair_list
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.runs import Run
from tests.interpret.circuits import INDUCTION, PREVIOUS, induction_circuit


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Three layers of two heads, keys and values of different widths, and gains that are not 1."""
    sizes = {"embedding_size": 12, "context_size": 16, "num_layers": 3, "num_heads": 2, "d_key": 5, "d_value": 4}
    torch.manual_seed(1)
    model = build_model(validate({"model": {**sizes, "d_ff": 9}, "tokenizer": {"vocab_size": 300}})).eval()
    for block in model.blocks:
        block.attention_norm.weight.data = torch.rand(12) + 0.5
    return model


@pytest.fixture
def trained(trained_run: Run) -> Transformer:
    return trained_run.load_model("best")


def folded(model: Transformer, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """W_OV and W_QK of a head as whole matrices, for row vectors: slices of the weights, one at a time."""
    attention, gain = model.blocks[layer].attention, torch.diag(model.blocks[layer].attention_norm.weight)
    keys = slice(head * model.d_key, (head + 1) * model.d_key)
    values = slice(head * model.d_value, (head + 1) * model.d_value)
    value, output = attention.value.weight[values], attention.output.weight[:, values]
    query, key = attention.query.weight[keys], attention.key.weight[keys]
    ov, qk = gain @ value.T @ output.T, gain @ query.T @ key @ gain
    return ov.detach().double().numpy(), qk.detach().double().numpy()


@pytest.mark.parametrize("name", ["model", "trained"])
def test_scores_are_those_of_whole_matrices(name: str, request: pytest.FixtureRequest) -> None:
    model: Transformer = request.getfixturevalue(name)
    result = composition_scores(model)
    assert result.holds
    for (layer, head, later_layer, later_head), scores in zip(result.pairs, result.scores, strict=True):
        assert layer < later_layer
        ov, (later_ov, later_qk) = folded(model, layer, head)[0], folded(model, later_layer, later_head)
        expected = [
            np.linalg.norm(ov @ later) / np.linalg.norm(ov) / np.linalg.norm(later)
            for later in (later_qk, later_qk.T, later_ov)
        ]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_pairs() -> None:
    assert pair_list(2, 2).tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert len(pair_list(4, 3)) == 9 * (3 + 2 + 1)
    assert pair_list(1, 4).shape == (0, 4)


def test_a_single_layer_has_no_pairs() -> None:
    config = validate({"model": {"num_layers": 1, "embedding_size": 8}, "tokenizer": {"vocab_size": 300}})
    result = composition_scores(build_model(config))
    assert result.scores.shape == (0, 3)
    assert result.holds


def test_the_circuit_composes_by_its_keys() -> None:
    """The induction head looks for its token where the previous-token head has written: K, and neither Q nor V."""
    result = composition_scores(induction_circuit())
    assert result.holds
    row = result.pairs.tolist().index([*PREVIOUS, *INDUCTION])
    vocab_size = 24
    # W_OV is a permutation of the vocabulary's axes into others, W_QK of those into the token's: norms are known.
    assert result.scores[row] == pytest.approx([0, vocab_size**-0.5, 0], abs=1e-6)
    others = np.delete(result.scores, row, axis=0)
    assert not np.nanmax(others, initial=0) > 1e-6


def test_random_weights_score_chance() -> None:
    sizes = {"embedding_size": 128, "num_layers": 2, "num_heads": 4, "d_key": 32, "d_value": 32}
    torch.manual_seed(0)
    result = composition_scores(build_model(validate({"model": sizes, "tokenizer": {"vocab_size": 300}})))
    assert result.chance == pytest.approx(128**-0.5)
    np.testing.assert_allclose(result.scores / result.chance, 1, atol=0.1)


def test_a_head_that_writes_nothing_has_no_score() -> None:
    settings = {"num_layers": 2, "num_heads": 2, "zero_output_init": True}
    result = composition_scores(build_model(validate({"model": settings, "tokenizer": {"vocab_size": 300}})))
    assert np.isnan(result.scores).all()
    assert result.holds


def test_it_knows_no_basis_of_keys_and_values(model: Transformer) -> None:
    """Q M and K M^-T, V M and M^-1 O are the same heads."""
    changed = deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(5, 5, generator=generator), torch.randn(4, 4, generator=generator)
    with torch.no_grad():
        for block in changed.blocks:
            attention = block.attention
            attention.query.weight[:5] = keys @ attention.query.weight[:5]
            attention.key.weight[:5] = keys.inverse().T @ attention.key.weight[:5]
            attention.value.weight[:4] = values @ attention.value.weight[:4]
            attention.output.weight[:, :4] = attention.output.weight[:, :4] @ values.inverse()
    np.testing.assert_allclose(composition_scores(changed).scores, composition_scores(model).scores, rtol=1e-4)


def test_rows(model: Transformer) -> None:
    result = composition_scores(model)
    rows = list(result.rows())
    assert len(rows) == 12 * 3
    assert rows[1] == {
        "layer": 0,
        "head": 0,
        "later_layer": 1,
        "later_head": 0,
        "kind": "k",
        "score": float(result.scores[0, 1]),
        "chance": 12**-0.5,
    }
