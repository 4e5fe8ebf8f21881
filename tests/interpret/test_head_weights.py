"""Circuits of heads from the weights: against whole matrices, on a circuit written by hand, and by chance."""

import numpy as np
import pytest
import torch

from lumiere.interpret.head_weights import NO_TOKEN, effective_ranks, factored_svd, groups_of, head_weights
from lumiere.lab.circuits import known_circuit
from lumiere.models.transformer import Transformer
from tests.interpret.models import circuits, exact, random_model, untrained_model


def test_singular_values_and_tokens_are_those_of_whole_matrices(exact_model: Transformer) -> None:
    model = exact_model
    found = head_weights(model, layers=[0, 1], heads=[1], directions=2, top_k=4, listed=range(40, 300))
    embedding = model.token_embedding.weight.detach().numpy()[40:300]
    readout = model.readout()[0].detach().numpy()[40:300]
    for row, layer in enumerate(found.layers):
        for c, matrix in enumerate(circuits(model, layer, 1)):
            u, values, vt = np.linalg.svd(matrix)
            rank = (model.d_value, model.d_key)[c]
            np.testing.assert_allclose(found.singular_values[row, 0, c, :rank], values[:rank])
            assert np.isnan(found.singular_values[row, 0, c, rank:]).all()
            assert found.norms[row, 0, c] == pytest.approx(np.linalg.norm(matrix))
            for direction in range(2):
                first, second = embedding @ u[:, direction], (readout, embedding)[c] @ vt[direction]
                sign = np.sign(first[np.abs(first).argmax()])
                for side, effects in enumerate((sign * first, sign * second)):
                    order = np.argsort(-effects)[:4]
                    assert found.tokens[row, 0, c, direction, side].tolist() == (order + 40).tolist()
                    np.testing.assert_allclose(found.effects[row, 0, c, direction, side], effects[order], atol=1e-9)


def test_a_handmade_induction_circuit_composes_by_keys_and_nothing_else() -> None:
    """The previous-token head copies all V tokens alike, and the induction head's keys read only what it wrote.

    Each of V equal singular values meets another one, so that the score is V t^2 / (V t^2) / sqrt(V).
    """
    model = known_circuit("induction").model
    found = head_weights(model)
    scores = {
        tuple(pair): dict(zip("qkv", row, strict=True))
        for pair, row in zip(found.pairs.tolist(), found.scores, strict=True)
    }
    composed = scores[0, 0, 1, 0]
    assert composed["k"] == pytest.approx(model.vocab_size**-0.5, abs=1e-6)
    assert max(composed["q"], composed["v"]) < 1e-6
    others = [value for pair, row in scores.items() if pair[2:] == (1, 0) and pair[1] for value in row.values()]
    assert max(others) < 1e-6
    for layer in range(2):
        assert (found.groups[layer, 0, 0] == 0).all()  # copying has no preferred direction
    assert found.tokens[0, 1, 0, :, 0, 0].min() != NO_TOKEN


def test_random_models_are_at_chance() -> None:
    found = head_weights(untrained_model(300, embedding_size=128, num_layers=2, num_heads=4, d_key=32, d_value=32))
    np.testing.assert_allclose(found.random_means / found.chance, 1, atol=0.05)
    assert (found.random_highs < 1.2 * found.chance).all()
    assert (found.scores < 1.2 * found.chance).all()


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("groups", [None, 1])
def test_biases_are_named_apart(norm: str, groups: int | None) -> None:
    model = exact(random_model(norm=norm, bias="all", num_key_value_heads=groups))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5)
    before = head_weights(model)
    block, head, shared = model.blocks[1], 1, 1 if groups is None else 0
    attention, gain = block.attention, block.attention_norm.weight
    offset = torch.zeros(12).double() if block.attention_norm.bias is None else block.attention_norm.bias
    with torch.no_grad():
        own = {
            part: (linear.weight[place * size : (place + 1) * size], linear(offset)[place * size : (place + 1) * size])
            for part, linear, place, size in (
                ("query", attention.query, head, 6),
                ("key", attention.key, shared, 6),
                ("value", attention.value, shared, 7),
            )
        }
        center = (lambda x: x - x.mean()) if norm == "layer" else (lambda x: x)
        assert gain is not None
        expected = [
            center((own["query"][1] @ own["key"][0]) * gain).norm(),
            center((own["key"][1] @ own["query"][0]) * gain).norm(),
            (attention.output.weight[:, 7:14] @ own["value"][1]).norm(),
        ]
    np.testing.assert_allclose(before.constant_norms[1, head], expected)
    for linear in (attention.query, attention.key, attention.value):
        linear.bias.data.zero_()
    after = head_weights(model)
    assert np.array_equal(after.singular_values, before.singular_values, equal_nan=True)
    assert norm == "layer" or not after.constant_norms[1].any()


def test_groups_are_runs_of_nearly_equal_values() -> None:
    values = np.array([[5.0, 4.95, 4.9, 3.0, 2.0, 1.99], [1.0, 0.0, 0.0, 0.0, np.nan, np.nan]])
    assert groups_of(values).tolist() == [[0, 0, 0, 3, 4, 4], [0, 1, 1, 1, 4, 5]]


def test_effective_ranks_are_those_of_simple_matrices() -> None:
    values = np.array([[1.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    np.testing.assert_allclose(effective_ranks(values), [1, 2, np.nan])


def test_a_product_is_decomposed_without_being_computed() -> None:
    draw = np.random.default_rng(0)
    tall, wide = draw.normal(size=(2, 9, 4)), draw.normal(size=(2, 4, 9))
    left, values, right = factored_svd(tall, wide)
    np.testing.assert_allclose((left * values[:, None]) @ right.swapaxes(1, 2), tall @ wide, atol=1e-12)


def test_a_head_that_writes_nothing_has_no_tokens() -> None:
    found = head_weights(untrained_model(num_layers=2, num_heads=2, zero_output_init=True))
    assert (found.tokens[:, :, 0] == NO_TOKEN).all()
    assert np.isnan(found.effects[:, :, 0]).all()
    assert (found.tokens[:, :, 1] != NO_TOKEN).all()
