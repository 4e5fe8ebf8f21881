"""Differences of two models: exactly nothing between a model and itself, permuted heads, and what is computed twice."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lumiere.components.kernels import IGNORED
from lumiere.components.layers import feedforward_of
from lumiere.data.batches import Batch
from lumiere.data.corpus import row_reader
from lumiere.data.dataset import document_sizes, tokenize_parts
from lumiere.data.tokenizer import EOT, PAD, SOT, Tokenizer
from lumiere.interpret import model_diff
from lumiere.interpret.model_diff import LinearCka, cheapest_assignment, diff_models, diff_texts, pattern_divergences
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run
from tests.interpret.models import BATCHES, batch_of, circuits, exact, nudged, one_row, permuted, random_model


def compare(first: Transformer, second: Transformer, batches: Sequence[Batch] = BATCHES, **options: Any) -> Any:
    """All fields of the result, with those of its parts."""
    found = diff_models(first, second, batches, **options)
    return SimpleNamespace(**found.as_dict(), holds=found.holds)


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_a_model_against_itself_gives_exactly_nothing(model: Transformer, is_exact: bool, across: bool) -> None:
    model = exact(model) if is_exact else model
    found = compare(model, deepcopy(model), across_layers=across)
    circuits = ("match_divergences", "ov_changes", "qk_changes")
    weights = ("relative_changes", "change_norms", "spectral_changes")
    for name in ("kl_ab", "kl_ba", "kl_ab_by_position", *circuits, *weights):
        assert (getattr(found, name) == 0).all(), name
    assert np.array_equal(found.losses_a, found.losses_b)
    assert found.losses[0] == found.losses[1]
    assert found.same_choice.all()
    assert (np.diagonal(found.cka) == 1).all()
    assert np.array_equal(found.matches[:, 0], found.matches[:, 1])
    assert len(found.tensors) == len(model.state_dict())
    paired = found.loss_difference
    assert (paired.difference, paired.standard_error, paired.low, paired.high) == (0, 0, 0, 0)
    assert found.holds


def test_tied_first_choices_are_shared(model: Transformer) -> None:
    """By each pair of choices: two of A's tokens are tied for the first place, and all of a uniform model's."""
    uniform, tied = deepcopy(model), deepcopy(model)
    uniform.token_embedding.weight.data.zero_()
    np.testing.assert_allclose(compare(uniform, deepcopy(uniform)).same_choice, 1 / model.vocab_size)
    rows_VE = tied.token_embedding.weight.data
    rows_VE[5] = rows_VE[6] = 100 * rows_VE[6]
    batch = BATCHES[0]
    with torch.no_grad():
        logits = [each(batch.tokens).logits[batch.targets != IGNORED] for each in (model, tied)]
    tops = [[set(torch.where(row == row.max())[0].tolist()) for row in rows] for rows in logits]
    assert max(len(top) for top in tops[1]) == 2
    expected = [len(a & b) / (len(a) * len(b)) for a, b in zip(*tops, strict=True)]
    np.testing.assert_allclose(compare(model, tied, [batch]).same_choice, expected)


def test_the_interval_is_over_documents() -> None:
    """Seven sequences that are the windows of three documents: the t interval of the documents' differences."""
    first, second, documents = random_model(), random_model(2), np.array([4, 4, 1, 8, 1, 4, 8])
    batches = [replace(batch, documents=part) for batch, part in zip(BATCHES, np.split(documents, [4]), strict=True)]
    found = compare(first, second, batches)
    paired = found.loss_difference
    assert paired.num_documents == 3
    assert paired.difference == pytest.approx((found.losses_b - found.losses_a).mean())
    reach = 4.303 * paired.standard_error * np.sqrt(3 / 2)
    assert (paired.low, paired.high) == pytest.approx((paired.difference - reach, paired.difference + reach))
    assert compare(first, second).loss_difference.num_documents == 7


def test_permuted_heads_are_matched_back(exact_model: Transformer) -> None:
    num_heads, generator = exact_model.num_heads, torch.Generator().manual_seed(3)
    orders = [torch.randperm(num_heads, generator=generator).tolist() for _ in exact_model.blocks]
    orders[0] = [*range(1, num_heads), 0]
    found = compare(exact_model, permuted(exact_model, orders))
    for values in (found.kl_ab, found.losses_a - found.losses_b, np.diagonal(found.cka) - 1):
        assert np.abs(values).max() < 1e-10
    partner = dict(found.matches.tolist())
    for layer, order in enumerate(orders):
        for new, old in enumerate(order):
            assert partner[layer * num_heads + old] == layer * num_heads + new
    assert max(values.max() for values in (found.match_divergences, found.ov_changes, found.qk_changes)) < 1e-10
    assert not np.array_equal(found.matches[:, 0], found.matches[:, 1])
    changed = {name for name, change in zip(found.tensors, found.change_norms, strict=True) if change}
    assert changed
    assert all(".attention." in name for name in changed)


def test_heads_are_found_in_other_layers() -> None:
    """Layers that only read the embedding, since nothing is ever written: exchanged, they do the same elsewhere."""
    model = exact(random_model())
    for block in model.blocks:
        block.attention.output.weight.data.zero_()
        feedforward_of(block).down.weight.data.zero_()
    other = deepcopy(model)
    other.blocks = torch.nn.ModuleList(reversed(list(model.blocks)))  # pyright: ignore[reportAttributeAccessIssue]
    within, across = (compare(model, other, across_layers=across) for across in (False, True))
    assert across.matches.tolist() == [[0, 4], [1, 5], [2, 2], [3, 3], [4, 0], [5, 1]]
    assert (across.match_divergences == 0).all()
    assert within.match_divergences[[0, 1, 4, 5]].min() > 0
    assert np.isnan(within.pattern_divergences[:2, 2:]).all()
    assert np.array_equal(within.pattern_divergences[:2, :2], across.pattern_divergences[:2, :2])


def test_predictions_by_an_independent_computation(exact_model: Transformer) -> None:
    """One sequence at a time, without padding, by torch's own losses and divergences."""
    model, other = exact_model, nudged(exact_model)
    found, place = compare(model, other), 0
    rows = [(batch, row) for batch in BATCHES for row in range(len(batch.tokens))]
    for sequence, (batch, row) in enumerate(rows):
        count = int((batch.targets[row] != IGNORED).sum())
        targets = batch.targets[row, :count]
        with torch.no_grad():
            a, b = (m(batch.tokens[row : row + 1, :count]).logits[0].log_softmax(-1) for m in (model, other))
        own = slice(place, place + count)
        assert (found.sequences[own] == sequence).all()
        assert found.positions[own].tolist() == list(range(1, count + 1))
        assert found.targets[own].tolist() == targets.tolist()
        for name, expected in {
            "kl_ab": F.kl_div(b, a, reduction="none", log_target=True).sum(-1),
            "kl_ba": F.kl_div(a, b, reduction="none", log_target=True).sum(-1),
            "losses_a": F.nll_loss(a, targets, reduction="none"),
            "losses_b": F.nll_loss(b, targets, reduction="none"),
        }.items():
            assert getattr(found, name)[own] == pytest.approx(expected.numpy(), abs=1e-10)
        place += count
    assert place == len(found.targets)
    for number, mean in zip(found.position_numbers, found.kl_ab_by_position, strict=True):
        assert mean == pytest.approx(found.kl_ab[found.positions == number].mean())
    assert found.kl_ab.mean() > 1e-3


def test_patterns_and_weights_by_an_independent_computation() -> None:
    model, other, batch = exact(random_model()), exact(random_model(seed=2)), BATCHES[0]
    found = compare(model, other, [batch])
    p, q = (m(batch.tokens).attention_weights[:, 1].detach().numpy() for m in (model, other))
    rows = [(b, t) for b, t in np.ndindex(*batch.tokens.shape) if t and batch.tokens[b, t] != PAD]
    total = 0.0
    for b, t in rows:
        x, y = p[b, 1, t, : t + 1], q[b, 0, t, : t + 1]
        total += (x * np.log2(2 * x / (x + y)) + y * np.log2(2 * y / (x + y))).sum() / 2
    assert found.pattern_divergences[3, 2] == pytest.approx(total / len(rows))
    for (a, b), *changes in zip(found.matches, found.ov_changes, found.qk_changes, strict=True):
        for old, new, change in zip(
            circuits(model, *divmod(a, 2)), circuits(other, *divmod(b, 2)), changes, strict=True
        ):
            assert change == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old))
    for number, name in enumerate(found.tensors):
        old, new = (each.state_dict()[name] for each in (model, other))
        assert found.relative_changes[number] == pytest.approx(((new - old).norm() / old.norm()).item())
        largest = torch.linalg.svdvals((new - old).reshape(len(old), -1))[0].item()
        assert found.spectral_changes[number] == pytest.approx(largest)


def test_sizes_may_differ() -> None:
    """Fewer layers, more heads, another width, a shorter context."""
    model = exact(random_model())
    other = exact(random_model(seed=2, num_layers=1, num_heads=4, embedding_size=8, context_size=6))
    found = compare(model, other)
    assert found.cka.shape == (4, 2)
    assert found.across_layers
    assert len(found.matches) == 4
    assert np.isnan(found.ov_changes).all()
    assert found.tensors == ()
    assert "token_embedding.weight" in found.other_tensors
    assert max(map(len, found.tokens)) == 7
    assert found.holds


def test_other_tokenizers_leave_bits_per_byte(trained_run: Run) -> None:
    texts = ["Once upon a time there was a dog.", "The dog sang.", "Then it slept, and all was well."]
    tokenizers = [trained_run.load_tokenizer(), Tokenizer.train(texts * 3, 270, 2)]
    models = [trained_run.load_model("best"), random_model(vocab_size=len(tokenizers[1]))]
    read = row_reader(texts, None)
    sized = [
        (split := tokenize_parts(read(), tokenizer), document_sizes(read(), split, tokenizer))
        for tokenizer in tokenizers
    ]
    found = diff_texts(models[0], models[1], sized)
    for model, tokenizer, bits in zip(models, tokenizers, found.losses, strict=True):
        nats = 0.0
        for ids in ([SOT, *ids, EOT] for ids in tokenizer.encode_batch(texts)):
            for first in range(0, len(ids) - 1, model.context_size):
                window = torch.tensor([ids[first : first + model.context_size + 1]])
                with torch.no_grad():
                    nats += F.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:], reduction="sum").item()
        assert bits == pytest.approx(nats / np.log(2) / sum(len(text.encode()) for text in texts))
    assert found.loss_difference is not None
    assert found.loss_difference.difference == pytest.approx(found.losses[1] - found.losses[0])
    assert "tokenizers differ" in found.not_compared[0]
    assert "token_embedding.weight" in found.weights.other_tensors


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="320 and 310"):
        diff_models(random_model(), random_model(vocab_size=310), BATCHES)


def test_one_position_has_no_heads_to_match() -> None:
    model = random_model()
    found = diff_models(model, nudged(model), [batch_of([2], width=1)])
    assert found.heads is None
    assert found.loss_difference is None
    assert "heads" in found.not_compared[0]
    assert "pattern_divergences" not in found.as_dict()


def test_only_the_start_of_many_sequences_has_its_patterns_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = random_model(), random_model(seed=2)
    monkeypatch.setattr(model_diff, "PATTERN_SEQUENCES", 5)
    some = compare(model, other)
    expected = compare(model, other, [BATCHES[0], one_row(BATCHES[1], 0)])
    assert some.num_pattern_sequences == 5
    assert some.match_divergences == pytest.approx(expected.match_divergences, abs=1e-6)


def cka(x: np.ndarray, y: np.ndarray, num_parts: int = 3) -> float:
    sums = LinearCka()
    for first, second in zip(np.array_split(x, num_parts), np.array_split(y, num_parts), strict=True):
        sums.add([torch.from_numpy(first)], [torch.from_numpy(second)])
    return float(sums.similarities()[0, 0])


def by_grams(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the (N, N) matrices of all dot products, tr(KHLH)."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.integers(2, 6))
def test_cka_is_the_papers_and_does_not_see_rotations_scales_and_shifts(seed: int, scale: float, width: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(20, 5)), draw.normal(size=(20, width))
    expected = cka(x, y)
    assert expected == pytest.approx(by_grams(x, y))
    rotation = np.linalg.qr(draw.normal(size=(5, 5)))[0]
    assert cka(scale * x @ rotation + 1000, y) == pytest.approx(expected, rel=1e-6)
    assert cka(x, scale * x @ rotation) == pytest.approx(1)
    assert cka(y, x) == pytest.approx(expected)
    assert cka(x @ np.diag([1, 1, 1, 1, 50]), x) < 0.999
    assert cka(x, x) == 1


def test_cka_of_fewer_tokens_than_columns_is_the_papers() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(9, 40)), draw.normal(size=(9, 30))
    sums = LinearCka()
    for first, second in zip(np.array_split(x, 3), np.array_split(y, 3), strict=True):
        sums.add([torch.from_numpy(first)] * 2, [torch.from_numpy(second)])
    assert not sums.products
    assert sums.similarities() == pytest.approx(by_grams(x, y))


def test_cka_of_what_never_changes_is_not_known() -> None:
    assert np.isnan(cka(np.ones((9, 3)), np.random.default_rng(0).normal(size=(9, 3))))


def test_divergences_are_0_for_equal_and_1_for_disjoint_patterns() -> None:
    same = torch.rand(2, 2, 5, 5).softmax(-1)
    disjoint = torch.zeros(1, 2, 2, 4)
    disjoint[0, 0, :, 1], disjoint[0, 1, :, 2] = 1, 1
    counts = torch.ones(2, 5, dtype=torch.bool)
    assert np.diagonal(pattern_divergences(same, same.clone(), counts)).tolist() == [0, 0]
    for counts, total in ((torch.tensor([[True, True]]), 2), (torch.tensor([[True, False]]), 1)):
        found = pattern_divergences(disjoint, disjoint, counts)
        assert found == pytest.approx(np.array([[0, total], [total, 0]]))


def least_cost(costs: np.ndarray) -> float:
    if len(costs) > costs.shape[1]:
        costs = costs.T
    rows = np.arange(len(costs))
    return min(costs[rows, list(columns)].sum() for columns in permutations(range(costs.shape[1]), len(costs)))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000), st.sampled_from(["real", "ties", "negative"]))
def test_no_assignment_is_cheaper(num_rows: int, num_columns: int, seed: int, kind: str) -> None:
    draw = np.random.default_rng(seed)
    costs = (
        draw.integers(0, 3, (num_rows, num_columns)) if kind == "ties" else draw.normal(size=(num_rows, num_columns))
    )
    costs = np.abs(costs) if kind == "real" else costs
    before = costs.copy()
    pairs = cheapest_assignment(costs)
    assert len(pairs) == min(costs.shape)
    assert all(len(set(side)) == len(pairs) for side in pairs.T.tolist())
    assert pairs[:, 0].tolist() == sorted(pairs[:, 0])
    assert costs[tuple(pairs.T)].sum() == pytest.approx(least_cost(costs))
    assert np.array_equal(costs, before)


def test_costs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        cheapest_assignment(np.array([[np.nan, 1.0]]))
