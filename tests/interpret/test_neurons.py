"""Examples of neurons: held to a slow search of all activations."""

import numpy as np
import pytest
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.config.loader import validate
from lumiere.data.batches import Batch, batch_at
from lumiere.data.dataset import TokenizedCorpus
from lumiere.data.tokenizer import PAD
from lumiere.interpret.neurons import NO_EXAMPLE, neuron_examples, token_map
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.runs import Run


@pytest.fixture
def model(trained_run: Run) -> Transformer:
    return trained_run.load_model()


@pytest.fixture
def batches(trained_run: Run, tiny_corpus: TokenizedCorpus) -> list[Batch]:
    windows = tiny_corpus.windows("validation", trained_run.load_config())
    return [batch_at(step, windows, 4, seed=0) for step in range(2)]


def test_the_same_as_a_search_of_all_activations(model: Transformer, batches: list[Batch]) -> None:
    result = neuron_examples(model, batches, num_neurons=32, num_examples=3, before=2, after=1)
    assert result.holds
    tokens_WT = torch.cat([batch.tokens for batch in batches])
    assert (result.tokens == tokens_WT.numpy()).all()
    for layer in range(model.num_layers):
        posts = [
            run_with_cache(model, row[None], [f"blocks.{layer}.mlp.hook_post"])[1] for row in tokens_WT
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


def test_those_that_write_most_come_first(model: Transformer, batches: list[Batch]) -> None:
    few, all_of_them = (neuron_examples(model, batches, count, 1) for count in (5, 32))
    assert (few.neurons == all_of_them.neurons[:, :5]).all()
    for layer, block in enumerate(model.blocks):
        norms = block.feedforward.down.weight.detach().norm(dim=0).numpy()[all_of_them.neurons[layer]]
        written = np.abs(all_of_them.activations[layer, :, 0]) * norms
        assert (np.diff(written) <= 1e-6).all()


def test_what_is_promoted_rises_most(model: Transformer, batches: list[Batch]) -> None:
    """Adding what the neuron writes to a stream, with the final norm's scale frozen, lifts these logits most."""
    result = neuron_examples(model, batches, num_neurons=4, num_promoted=3)
    for layer, block in enumerate(model.blocks):
        for row, neuron in enumerate(result.neurons[layer]):
            written = block.feedforward.down.weight.detach()[:, neuron] * float(result.activations[layer, row, 0])
            rises = model.token_embedding.weight.detach() @ (written * model.final_norm.weight.detach())
            assert set(result.promoted[layer, row]) == set(rises.topk(3).indices.tolist())


def test_a_window_of_one_token_gives_no_example(model: Transformer, batches: list[Batch]) -> None:
    tokens = batches[0].tokens.clone()
    tokens[1:, 1:] = PAD
    result = neuron_examples(model, [Batch(tokens, batches[0].targets, 1)], num_neurons=2, num_examples=3)
    assert result.holds
    assert (result.windows == [0, NO_EXAMPLE, NO_EXAMPLE]).all()
    assert np.isnan(result.activations[..., 1:]).all()
    assert len(list(result.rows())) == 2 * model.num_layers


def test_rows(model: Transformer, batches: list[Batch]) -> None:
    result = neuron_examples(model, batches, num_neurons=2, num_examples=50)
    rows = list(result.rows())
    assert len(rows) == result.windows.size  # as many examples as windows, not 50
    assert not (result.windows == NO_EXAMPLE).any()
    first = rows[0]
    assert first["token"] == result.tokens[first["window"], first["position"]]


TOKENS = tuple(range(3, 60))


def test_the_map_keeps_the_directions_of_most_variance(trained_run: Run) -> None:
    model = trained_run.load_model()
    result = token_map(model, TOKENS)
    table = model.token_embedding.weight.detach().double().numpy()[list(TOKENS)]
    variances = np.linalg.eigvalsh(np.cov(table.T))[::-1]
    assert result.holds
    assert result.variances == pytest.approx(variances[:2] / variances.sum())
    assert result.points.var(axis=0, ddof=1) == pytest.approx(variances[:2])
    assert result.points.mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert result.points[:, 0] @ result.points[:, 1] == pytest.approx(0, abs=1e-9)


def test_neighbours_have_the_largest_cosines(trained_run: Run) -> None:
    model = trained_run.load_model()
    result = token_map(model, TOKENS, num_neighbours=4)
    table = model.token_embedding.weight.detach().double().numpy()[list(TOKENS)]
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


def test_three_tokens_are_enough(trained_run: Run) -> None:
    result = token_map(trained_run.load_model(), (3, 4, 5))
    assert result.neighbours.shape == (3, 2)
    assert result.variances.sum() == pytest.approx(1)
    assert [row["token"] for row in result.rows()] == [3, 4, 5]


@pytest.mark.parametrize(("width", "num_tokens"), [(12, 1), (12, 2), (1, 5)])
def test_fewer_than_two_components_are_filled_with_zeros(width: int, num_tokens: int) -> None:
    sizes = {"embedding_size": width, "num_layers": 1, "num_heads": 1, "d_key": 2, "d_value": 2, "d_ff": 2}
    model = build_model(validate({"model": sizes, "tokenizer": {"vocab_size": 300}}))
    tokens = list(range(10, 10 + num_tokens))
    result = token_map(model, tokens)
    assert result.holds
    table = model.token_embedding.weight.detach().double().numpy()[tokens]
    distances = np.linalg.norm(table[:, None] - table, axis=-1)
    np.testing.assert_allclose(np.abs(result.points[:, None, 0] - result.points[:, 0]), distances, atol=1e-12)
    np.testing.assert_allclose(result.points[:, 1], 0, atol=1e-12)
    assert result.neighbours.shape == (num_tokens, min(5, num_tokens - 1))
