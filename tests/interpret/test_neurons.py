"""Examples of neurons: held to a slow search of all activations."""

import numpy as np
import pytest
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.components.layers import feedforward_of
from lumiere.data.batches import Batch
from lumiere.data.tokenizer import PAD
from lumiere.interpret.neurons import NO_EXAMPLE, neuron_examples, token_map
from lumiere.models.transformer import Transformer
from tests.interpret.models import BATCHES, untrained_model


def test_the_same_as_a_search_of_all_activations(trained: Transformer) -> None:
    result = neuron_examples(trained, BATCHES, num_neurons=32, num_examples=3, before=2, after=1)
    assert next(result.rows())["token"] == result.tokens[result.windows[0, 0, 0], result.positions[0, 0, 0]]
    tokens_WT = torch.cat([batch.tokens for batch in BATCHES])
    assert (result.tokens == tokens_WT.numpy()).all()
    for layer in range(trained.num_layers):
        posts = [
            run_with_cache(trained, row[None], [f"blocks.{layer}.mlp.hook_post"])[1] for row in tokens_WT
        ]  # one window at a time
        posts_WTF = np.stack([next(iter(cache.values()))[0].detach().numpy() for cache in posts])
        sizes_WTF = np.where((tokens_WT == PAD).numpy()[..., None], -1, np.abs(posts_WTF))[:, 1:]
        for row, neuron in enumerate(result.neurons[layer]):
            best = np.sort(sizes_WTF[:, :, neuron].max(axis=1))[::-1][:3]
            assert np.abs(result.activations[layer, row]) == pytest.approx(best, abs=1e-5)
            for rank in range(3):
                window, position = result.windows[layer, row, rank], result.positions[layer, row, rank]
                assert position > 0
                assert tokens_WT[window, position] != PAD
                around = result.around[layer, row, rank]
                for offset, value in enumerate(around):
                    place = position + offset - 2
                    inside = 0 <= place < tokens_WT.shape[1] and tokens_WT[window, place] != PAD
                    assert np.isnan(value) != inside
                    if inside:
                        assert value == pytest.approx(posts_WTF[window, place, neuron], abs=1e-5)


def test_those_that_write_most_come_first(trained: Transformer) -> None:
    few, all_of_them = (neuron_examples(trained, BATCHES, count, 1) for count in (5, 32))
    assert (few.neurons == all_of_them.neurons[:, :5]).all()
    for layer, block in enumerate(trained.blocks):
        norms = feedforward_of(block).down.weight.detach().norm(dim=0).numpy()[all_of_them.neurons[layer]]
        written = np.abs(all_of_them.activations[layer, :, 0]) * norms
        assert (np.diff(written) <= 1e-6).all()


def test_what_is_promoted_rises_most(trained: Transformer) -> None:
    """Adding what the neuron writes to a stream, with the final norm's scale frozen, lifts these logits most."""
    result = neuron_examples(trained, BATCHES, num_neurons=4, num_promoted=3)
    for layer, block in enumerate(trained.blocks):
        for row, neuron in enumerate(result.neurons[layer]):
            written = feedforward_of(block).down.weight.detach()[:, neuron] * float(result.activations[layer, row, 0])
            rises = trained.token_embedding.weight.detach() @ (
                written * trained.final_norm.get_parameter("weight").detach()
            )
            assert set(result.promoted[layer, row]) == set(rises.topk(3).indices.tolist())


def test_a_window_of_one_token_gives_no_example(trained: Transformer) -> None:
    tokens = BATCHES[0].tokens.clone()
    tokens[1:, 1:] = PAD
    batch = Batch(tokens, BATCHES[0].targets, 1, lengths=np.array([10, 1, 1, 1]))
    result = neuron_examples(trained, [batch], num_neurons=2, num_examples=3)
    assert result.holds
    assert (result.windows == [0, NO_EXAMPLE, NO_EXAMPLE]).all()
    assert np.isnan(result.activations[..., 1:]).all()
    assert len(list(result.rows())) == 2 * trained.num_layers


TOKENS = tuple(range(3, 60))


def test_the_map_keeps_the_directions_of_most_variance(trained: Transformer) -> None:
    result = token_map(trained, TOKENS)
    table = trained.token_embedding.weight.detach().double().numpy()[list(TOKENS)]
    variances = np.linalg.eigvalsh(np.cov(table.T))[::-1]
    assert result.holds
    assert result.variances == pytest.approx(variances[:2] / variances.sum())
    assert result.points.var(axis=0, ddof=1) == pytest.approx(variances[:2])
    assert result.points.mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert result.points[:, 0] @ result.points[:, 1] == pytest.approx(0, abs=1e-9)


def test_neighbours_have_the_largest_cosines(trained: Transformer) -> None:
    result = token_map(trained, TOKENS, num_neighbours=4)
    table = trained.token_embedding.weight.detach().double().numpy()[list(TOKENS)]
    table -= table.mean(axis=0)
    for row, token in enumerate(TOKENS):
        cosines = {
            other: table[row] @ vector / np.linalg.norm(table[row]) / np.linalg.norm(vector)
            for other, vector in zip(TOKENS, table, strict=True)
            if other != token
        }
        best = sorted(cosines, key=lambda other: -cosines[other])[:4]
        assert result.neighbours[row].tolist() == best
        assert result.cosines[row] == pytest.approx([cosines[other] for other in best])


@pytest.mark.parametrize(("width", "num_tokens"), [(12, 1), (12, 2), (1, 5)])
def test_fewer_than_two_components_are_filled_with_zeros(width: int, num_tokens: int) -> None:
    sizes = {"embedding_size": width, "num_layers": 1, "num_heads": 1, "d_key": 2, "d_value": 2, "d_ff": 2}
    model = untrained_model(**sizes)
    tokens = list(range(10, 10 + num_tokens))
    result = token_map(model, tokens)
    assert result.holds
    table = model.token_embedding.weight.detach().double().numpy()[tokens]
    distances = np.linalg.norm(table[:, None] - table, axis=-1)
    np.testing.assert_allclose(np.abs(result.points[:, None, 0] - result.points[:, 0]), distances, atol=1e-12)
    np.testing.assert_allclose(result.points[:, 1], 0, atol=1e-12)
    assert result.neighbours.shape == (num_tokens, min(5, num_tokens - 1))
