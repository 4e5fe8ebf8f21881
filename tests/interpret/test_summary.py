"""The summary of models that are well, and of models that are broken on purpose."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.config.loader import validate
from lumiere.data.batches import Batch
from lumiere.data.tokenizer import PAD
from lumiere.interpret import summary as weights
from lumiere.interpret.summary import (
    PARTS,
    ModelSummary,
    count_parts,
    matrix_facts,
    measure_activity,
    same_rows,
    spectrum_facts,
    summarize,
)
from lumiere.models.transformer import Transformer, build_model
from lumiere.training.costs import count_parameters
from tests.interpret.models import SIZES, untrained_model

TEXT = torch.randint(3, 320, (4, 16), generator=torch.Generator().manual_seed(0))


def random_model(positions: str = "learned") -> Transformer:
    return untrained_model(**{**SIZES, "num_layers": 2, "positions": positions})


def summary(model: Transformer, token_counts: np.ndarray | None = None) -> ModelSummary:
    return summarize(model, [Batch(TEXT, TEXT, TEXT.numel())], token_counts)


def found(result: ModelSummary) -> dict[str, tuple[str, ...]]:
    return {warning.what: warning.places for warning in result.warnings}


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_fresh_model_is_well(positions: str) -> None:
    result = summary(random_model(positions), np.ones(320))
    assert found(result) == {}
    assert result.holds
    assert len(result.receipts) == 4
    assert (result.position_norms is None) == (positions == "rotary")
    assert len(result.checks) == (10 if positions == "learned" else 9)


def same_direction(weight: torch.Tensor) -> None:
    weight[:] = torch.outer(torch.randn(12), torch.randn(12)) * 0.01


@pytest.mark.parametrize(
    ("name", "break_it", "what", "place"),
    [
        ("blocks.0.feedforward.down", lambda w: w.mul_(1e-6), "parts of layers that do nothing", "L0 feed-forward"),
        ("blocks.0.attention.value", lambda w: w[7:].zero_(), "heads that do nothing", "L0H1"),
        ("blocks.1.feedforward.up", lambda w: w[4].zero_(), "dead neurons", "L1N4"),
        ("final_norm", lambda w: w[3].fill_(-1e-3), "gains that shut a direction out", "final_norm.3"),
        ("blocks.0.attention.key", same_direction, "matrices of low rank", "blocks.0.attention.key.weight"),
        ("token_embedding", lambda w: w[17].zero_(), "tokens without a vector", "17"),
        ("token_embedding", lambda w: w[99].copy_(2 * w[41]), "tokens with the vector of an earlier token", "99, 41"),
        ("position_embedding", lambda w: w[9].copy_(w[8]), "positions with the vector of an earlier one", "9, 8"),
    ],
)
def test_what_is_broken_is_found_and_nothing_else(
    name: str, break_it: Callable[[torch.Tensor], None], what: str, place: str
) -> None:
    model = random_model()
    break_it(model.get_parameter(f"{name}.weight").data)
    result = summary(model)
    assert found(result) == {what: (place,)}
    assert result.holds


def test_an_attention_that_writes_nothing_is_found_with_its_heads() -> None:
    model = random_model()
    model.blocks[1].attention.output.weight.data.zero_()
    assert found(summary(model)) == {
        "matrices of low rank": ("blocks.1.attention.output.weight",),
        "parts of layers that do nothing": ("L1 attention",),
        "heads that do nothing": ("L1H0", "L1H1"),
    }


def test_weights_that_are_not_finite_are_named_and_fail() -> None:
    model = random_model()
    model.get_parameter("blocks.1.feedforward.gate.weight").data[0, 0] = math.nan
    result = summary(model)
    assert found(result)["weights that are no finite numbers"] == ("blocks.1.feedforward.gate.weight",)
    assert not result.holds


def test_tokens_that_were_never_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PLACES_KEPT", 2)
    counts = np.ones(320)
    counts[[5, 300, 301]] = 0
    (warning,) = summary(random_model(), counts).warnings
    assert (warning.what, warning.count) == ("tokens that were never met in training", 3)
    assert warning.places == ("5", "300")


def test_without_a_text_the_weights_have_to_do() -> None:
    with_text, without = summary(random_model()), summarize(random_model())
    assert (without.num_windows, without.writes, without.largest_activations) == (0, None, None)
    assert len(without.receipts) == 3
    assert [c.what for c in without.checks] == [c.what for c in with_text.checks][:-3]
    assert list(without.rows()) == list(with_text.rows())


def test_embeddings() -> None:
    model = random_model()
    assert model.position_embedding is not None
    tokens, positions = model.token_embedding.weight.data, model.position_embedding.weight.data
    result = summary(model)
    np.testing.assert_allclose(result.token_norms, tokens.norm(dim=1), rtol=1e-5)
    share = tokens.mean(0).square().sum() / tokens.square().sum(1).mean()
    assert result.token_mean_share == pytest.approx(float(share), rel=1e-4)
    cosines = torch.cosine_similarity(positions[1:], positions[:-1])
    assert result.position_cosine == pytest.approx(float(cosines.mean()), abs=1e-5)
    moved = copy.deepcopy(model)
    moved.token_embedding.weight.data[:] = moved.token_embedding.weight.data[0]
    assert summary(moved).token_mean_share == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_parts_are_what_the_config_says(positions: str) -> None:
    config = validate({"model": {"positions": positions, "d_value": 12, "d_ff": 24, "num_layers": 3}})
    model, expected = build_model(config), count_parameters(config)
    assert count_parts(model) == {part: getattr(expected, part) for part in PARTS}
    assert sum(count_parts(model).values()) == model.num_parameters == expected.total


@pytest.mark.parametrize(
    ("matrix", "stable", "effective"),
    [
        (np.outer([1.0, 2.0, 3.0], [4.0, 5.0]), 1, 1),
        (np.eye(5) * 7, 5, 5),
        (np.diag([2.0, 1.0, 1.0]), 6 / 4, math.exp(0.5 * math.log(2) + 0.5 * math.log(4))),
        (np.zeros((3, 2)), 0, 0),
        (np.array([[1.0, math.inf]]), math.nan, math.nan),
    ],
)
def test_ranks_by_hand(matrix: np.ndarray, stable: float, effective: float) -> None:
    norm, rms, spectral, *ranks = spectrum_facts(matrix)
    sizes = [math.sqrt((matrix**2).sum()), math.sqrt((matrix**2).mean())]
    sizes = [*sizes, np.linalg.norm(matrix, 2)] if np.isfinite(matrix).all() else [math.nan] * 3
    assert [norm, rms, spectral, *ranks] == pytest.approx([*sizes, stable, effective], nan_ok=True)


def test_every_matrix_has_its_row() -> None:
    model = random_model()
    facts = matrix_facts(model)
    assert dict(zip(facts["matrices"], map(tuple, facts["shapes"]), strict=True)) == {
        name: tuple(value.shape) for name, value in model.state_dict().items() if value.ndim == 2
    }
    number = facts["matrices"].index("blocks.0.feedforward.gate.weight")
    gate = model.get_parameter("blocks.0.feedforward.gate.weight").detach().double()
    assert facts["norms"][number] == pytest.approx(float(gate.norm()))


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_same_rows_by_comparing_all(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "ROWS_AT_ONCE", rows_at_once)
    table = torch.randn(12, 5)
    table[7], table[9], table[4], table[11] = table[2] * 3, table[2] + 1e-4, -table[1], table[4]
    table[0] = table[5] = 0
    expected = []
    for row in range(12):
        cosines = [float(torch.cosine_similarity(table[row], table[other], dim=0)) for other in range(row)]
        expected += [(row, other) for other, cosine in enumerate(cosines) if cosine >= 0.999][:1]
    assert list(same_rows(table, 0.999)) == expected == [(7, 2), (9, 2), (11, 4)]


def test_means_are_those_of_the_tokens_one_by_one(model: Transformer) -> None:
    windows = torch.tensor([[0, 70, 71, 72, 70], [5, 9, 300, 1, 4], [80, PAD, PAD, PAD, PAD]])
    activity, _ = measure_activity(model, [Batch(windows, windows, 15, lengths=np.array([5, 5, 1]))])
    writes, heads = np.zeros((model.num_layers, 2)), np.zeros((model.num_layers, model.num_heads))
    largest = np.zeros((model.num_layers, model.d_ff))
    texts = [[token for token in window if token != PAD] for window in windows.tolist()]
    for text in texts:
        with torch.no_grad():
            _, cache = run_with_cache(model, torch.tensor([text]))
            for layer, block in enumerate(model.blocks):
                at = {leaf.removeprefix(f"blocks.{layer}."): value[0] for leaf, value in cache.items()}
                for position in range(len(text)):
                    before = at["hook_resid_pre"][position].norm()
                    writes[layer, 0] += float(at["hook_attn_out"][position].norm() / before)
                    writes[layer, 1] += float(
                        at["hook_mlp_out"][position].norm() / at["hook_resid_mid"][position].norm()
                    )
                    for head in range(model.num_heads):
                        alone = torch.zeros(model.num_heads, model.d_value)
                        alone[head] = at["attn.hook_z"][position, head]
                        heads[layer, head] += float(block.attention.output(alone.flatten()).norm() / before)
                    largest[layer] = np.maximum(largest[layer], at["mlp.hook_post"][position].abs().numpy())
    num_tokens = sum(map(len, texts))
    assert (activity["num_windows"], activity["num_tokens"]) == (3, num_tokens) == (3, 11)
    np.testing.assert_allclose(activity["writes"], writes / num_tokens, rtol=1e-4)
    np.testing.assert_allclose(activity["head_writes"], heads / num_tokens, rtol=1e-4)
    np.testing.assert_allclose(activity["largest_activations"], largest, rtol=1e-4)


def test_the_head_is_the_embedding_or_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr(model, "unembed", lambda resid: resid @ model.unembedding.T * 1.01)
    assert summary(model).receipts[-1].error > 1e-3
