"""Scores of heads: exact on a circuit built by hand, and against slow computations on random and trained models."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lumiere.data.tokenizer import PAD
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret import head_scores
from lumiere.interpret.head_scores import (
    SCORES,
    HeadScores,
    composition_scores,
    first_occurrences,
    longest_copy,
    pair_list,
    position_bands,
    repeated_tokens,
    roles_of,
    score_heads,
    source_masks,
)
from lumiere.models.transformer import Transformer
from tests.interpret.circuits import CURRENT, DUPLICATE, FIRST, INDUCTION, PREVIOUS, UNIFORM
from tests.interpret.models import circuits, exact, random_model, text_windows, untrained_model

LENGTH = 15
SHORT = torch.tensor([[0, 5, 6]])
"""For tests that look at something else."""
scored = partial(score_heads, tokens_NT=SHORT)
PLACES = {"previous": PREVIOUS, "current": CURRENT, "first": FIRST, "duplicate": DUPLICATE, "induction": INDUCTION}


@pytest.fixture
def repeats() -> torch.Tensor:
    return repeated_tokens(21, LENGTH, 4, seed=0, start=0, first=3)


def score(result: HeadScores, place: tuple[int, int], name: str) -> float:
    return float(result.scores[place][SCORES.index(name)])


def test_scores_are_1_where_a_head_does_just_that(circuit: Transformer, repeats: torch.Tensor) -> None:
    result = score_heads(circuit, repeats)
    assert result.holds
    for name, place in PLACES.items():
        assert score(result, place, name) == pytest.approx(1, abs=1e-6)
        assert name in result.roles[place[0]][place[1]]
    # These look nowhere else; but the previous token of token 1 is the first one.
    for name in ("previous", "current", "first"):
        for other in SCORES:
            if other != name:
                shared = 1 / (2 * LENGTH) if {name, other} == {"previous", "first"} else 0
                assert score(result, PLACES[name], other) == pytest.approx(shared, abs=1e-6)
    for name, other in (("induction", "duplicate"), ("duplicate", "induction")):
        assert score(result, PLACES[name], other) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(result.scores[UNIFORM], result.uniform, atol=1e-6)
    assert result.roles[UNIFORM[0]][UNIFORM[1]] == ()


def test_copying_of_the_circuit(circuit: Transformer, repeats: torch.Tensor) -> None:
    """The induction head copies each token; no other head writes where the output looks."""
    copying = score_heads(circuit, repeats).copying
    assert copying[INDUCTION] == pytest.approx(1)
    copying[INDUCTION] = np.nan
    assert np.isnan(copying).all()


def sources_by_hand(tokens: list[int], name: str, t: int) -> set[int]:
    if t == 0:
        return set()
    equal = {s for s in range(t) if tokens[s] == tokens[t]}
    after = {s + 1 for s in equal} - {t, t - 1}
    duplicates = equal - {t - 1}
    return {"previous": {t - 1}, "current": {t}, "first": {0}, "duplicate": duplicates, "induction": after}[name]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_masks_by_hand(tokens: list[int]) -> None:
    (masks,), (left_out,) = source_masks(torch.tensor([tokens]))
    for number, name in enumerate(SCORES):
        for t in range(len(tokens)):
            shares_source = {"duplicate": tokens[t - 1 : t], "induction": tokens[max(t - 2, 0) : max(t - 1, 0)]}
            assert left_out[number, t] == (shares_source.get(name) == [tokens[t]])
            assert set(masks[number, t].nonzero().flatten().tolist()) == sources_by_hand(tokens, name, t)


def test_repeated_tokens_are_the_start_token_and_different_tokens_twice() -> None:
    tokens, again, others = (repeated_tokens(30, 9, 2, seed, start=1, first=3) for seed in (5, 5, 6))
    for row in tokens.tolist():
        assert (row[0], row[1:10], len({*row[1:]})) == (1, row[10:], 9)
        assert 3 <= min(row[1:]) <= max(row[1:]) < 33
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, others)


def test_a_previous_token_head_on_a_period_of_two_is_no_induction_head(circuit: Transformer) -> None:
    """In s a b a b ... all of induction is at t - 1, but for the tokens that come a third time, at t - 3 and so on."""
    result = score_heads(circuit, torch.tensor([[0, *[3, 4] * 8]]))
    assert score(result, PREVIOUS, "previous") == pytest.approx(1, abs=1e-6)
    assert result.roles[PREVIOUS[0]][PREVIOUS[1]] == ("previous",)
    assert score(result, PREVIOUS, "induction") == pytest.approx(0, abs=1e-6)
    assert result.num_overlaps.tolist() == [0, 0, 0, 0, 14]
    assert result.num_destinations.tolist() == [16, 16, 16, 14, 12]
    # Of one token, duplicates are at t - 1 too.
    result = score_heads(circuit, torch.tensor([[0, *[3] * 12]]))
    assert result.roles[PREVIOUS[0]][PREVIOUS[1]] == ("previous",)
    assert result.num_overlaps.tolist() == [0, 0, 0, 11, 10]


def test_a_role_is_clearly_above_the_uniform_baseline() -> None:
    """By hand, at a threshold of 40 % and a baseline of 35 %: 10 points, two standard errors, five tokens."""
    uniform, enough = np.full(5, 0.35), np.full(5, 5)
    scores = np.array([[[0.46, 0.44, 0.39, 0.46, 0.46]]])
    errors = np.array([[[0.05, 0.01, 0.01, 0.06, np.nan]]])
    assert roles_of(scores, uniform, errors, enough, 0.4) == ((("previous",),),)
    assert roles_of(scores, uniform, errors, enough - 1, 0.4) == (((),),)


def excesses_by_hand(tokens: list[int], pattern_TS: torch.Tensor, name: str) -> list[tuple[float, float]]:
    """For each token with such a source, the attention to its sources and the share that uniform attention has."""
    sources = [(t, sources_by_hand(tokens, name, t)) for t in range(len(tokens))]
    return [(sum(float(pattern_TS[t, s]) for s in found), len(found) / (t + 1)) for t, found in sources if found]


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_scores_and_standard_errors_by_hand(model: Transformer, num_sequences: int) -> None:
    """Of one text over its tokens; of several over the sequences, of which some have more such tokens than others."""
    tokens = torch.randint(3, 7, (num_sequences, 12), generator=torch.Generator().manual_seed(0))
    result = score_heads(model, tokens)
    with torch.no_grad():
        patterns = [model(row[None]).attention_weights[0] for row in tokens]
    for layer, head, number in np.ndindex(*result.scores.shape):
        rows = [
            np.array(excesses_by_hand(row, pattern[layer, head], SCORES[number]))
            for row, pattern in zip(tokens.tolist(), patterns, strict=True)
        ]
        found = np.concatenate(rows)
        assert [result.scores[layer, head, number], result.uniform[number]] == pytest.approx(found.mean(0), abs=1e-6)
        clusters = rows if num_sequences > 1 else list(found[:, None])
        mean = (found[:, 0] - found[:, 1]).mean()
        residuals = [(cluster[:, 0] - cluster[:, 1] - mean).sum() for cluster in clusters]
        variance = len(clusters) / (len(clusters) - 1) * np.square(residuals).sum()
        assert result.errors[layer, head, number] == pytest.approx(np.sqrt(variance) / len(found), rel=1e-3)


def test_thresholds_and_a_wrong_trace(
    circuit: Transformer, repeats: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = score_heads(circuit, repeats, layers=[1], heads=[2, 1], threshold=0.999)
    assert part.roles == ((("induction",), ("current",)),)
    assert score_heads(circuit, repeats, layers=[0], heads=[3], threshold=0.0).roles == (((),),)
    assert (longest_copy(circuit, 100), longest_copy(circuit, 5)) == (16, 5)
    monkeypatch.setattr(np.linalg, "eigvals", lambda matrices: np.ones(matrices.shape[:2]))
    assert not score_heads(random_model(), SHORT).holds


def test_losses_and_gap_one_by_one(model: Transformer) -> None:
    tokens = repeated_tokens(200, 7, 3, seed=0, start=0, first=3)
    result = score_heads(model, tokens)
    with torch.no_grad():
        logits = [model(row[None]).logits[0, :-1] for row in tokens]
    found = [F.cross_entropy(each, row[1:], reduction="none") for each, row in zip(logits, tokens, strict=True)]
    losses = torch.stack(found).numpy()
    np.testing.assert_allclose(result.losses, losses.mean(0), rtol=1e-5)
    gaps = losses[:, 1:7].mean(1) - losses[:, 8:].mean(1)
    assert float(result.repeat_gap) == pytest.approx(gaps.mean(), abs=1e-5)
    assert float(result.repeat_gap_error) == pytest.approx(np.std(gaps, ddof=1) / np.sqrt(3), rel=1e-3)


def dense_copying(model: Transformer, layer: int, head: int, averaged: list[int]) -> float:
    """From the whole circuit of these tokens."""
    block = model.blocks[layer]
    width = model.d_value
    value = block.attention.value.weight[head * width : (head + 1) * width] * block.attention_norm.get_parameter(
        "weight"
    )
    output = block.attention.output.weight[:, head * width : (head + 1) * width]
    embedding = model.token_embedding.weight[averaged].double()
    circuit = embedding @ (output @ value).T.double() @ (embedding * model.final_norm.get_parameter("weight")).T
    eigenvalues = torch.linalg.eigvals(circuit.detach()).numpy()
    return float(eigenvalues.real.sum() / np.abs(eigenvalues).sum())


@pytest.mark.parametrize("averaged", [None, [3, 5, 8, 13, 21, 34, 55, 89, 144, 233]])
def test_copying_is_that_of_the_whole_matrix(model: Transformer, averaged: list[int] | None) -> None:
    result = score_heads(model, SHORT, averaged=averaged)
    ids = list(range(model.vocab_size)) if averaged is None else averaged
    for layer, head in np.ndindex(*result.copying.shape):
        assert result.copying[layer, head] == pytest.approx(dense_copying(model, layer, head, ids), abs=1e-6)
    assert np.ptp(result.copying) > 1e-4
    assert result.num_averaged == len(ids)


def test_in_context_score_by_hand() -> None:
    """Positions 1 to 3 and 15 to 20 of a context of 20; a window that ends early is left out."""
    model = random_model(context_size=20)
    windows = torch.randint(3, 300, (7, 21), generator=torch.Generator().manual_seed(0))
    windows[2, 19:] = PAD
    documents = np.array([4, 4, 4, 1, 9, 1, 1])
    result = score_heads(model, SHORT, windows=text_windows(windows, documents))
    assert result.in_context_bands == ((1, 3), (15, 20))
    assert result.in_context_positions == (2, 17)
    full = [0, 1, 3, 4, 5, 6]
    with torch.no_grad():
        log_probabilities = model(windows[:, :-1]).logits.log_softmax(-1)
    bands, losses = ((1, 2, 3), range(15, 21)), np.zeros((6, 2))
    for row, n in enumerate(full):
        for column, band in enumerate(bands):
            losses[row, column] = np.mean([-float(log_probabilities[n, p - 1, windows[n, p]]) for p in band])
    np.testing.assert_allclose(result.in_context_losses, np.mean(losses, axis=0), rtol=1e-5)
    differences = losses[:, 1] - losses[:, 0]
    assert float(result.in_context_score) == pytest.approx(differences.mean(), abs=1e-5)
    _, (error,) = clustered_means(differences[None], np.ones(6), documents[full])
    assert float(result.in_context_error) == pytest.approx(error, rel=1e-4)
    assert (result.in_context_windows, result.in_context_documents) == (6, 3)


@pytest.mark.parametrize("context_size", [1, 2, 3, 4, 7, 64, 1024])
def test_the_bands_lie_apart_within_the_context(context_size: int) -> None:
    early, late = position_bands(context_size)
    assert 1 <= early[0] <= early[1] < late[0]
    assert late[0] <= late[1] == context_size or context_size == 1


def test_what_there_is_none_of_is_missing() -> None:
    model = random_model()
    result = score_heads(model, torch.tensor([[0, 5, 6, 7]]))
    assert np.isnan(result.scores[..., 3:]).all()
    assert np.isnan(result.uniform[3:]).all()
    assert result.num_destinations.tolist() == [3, 3, 3, 0, 0]
    assert np.isnan(result.repeat_gap)
    assert np.isnan(result.in_context_score)
    assert result.in_context_positions is None
    single = score_heads(model, torch.tensor([[5]]))
    assert np.isnan(single.scores).all()
    assert single.holds
    texts = score_heads(model, SHORT, text_windows(torch.arange(3, 37).view(2, 17), np.arange(2)))
    assert (texts.text_repeats, texts.text_documents) == (0, 0)
    assert texts.text_scores is not None
    assert np.isnan(texts.text_scores).all()
    assert np.isnan(texts.text_gap or 0)
    one = random_model(context_size=1)
    found = score_heads(one, torch.tensor([[5]]), text_windows(torch.tensor([[0, 5], [5, 6]]), np.arange(2)))
    assert (np.isnan(found.in_context_score), found.in_context_bands) == (True, None)


def names(num_windows: int, width: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """(N, T) windows of random tokens in which a name of three tokens comes twice."""
    draw = np.random.default_rng(seed)
    windows = draw.integers(3, vocab_size, (num_windows, width))
    for row in windows:
        first = draw.integers(1, width // 2 - 3)
        second = draw.integers(width // 2, width - 3)
        row[second : second + 3] = row[first : first + 3]
    return torch.from_numpy(windows)


def by_hand(windows: torch.Tensor, documents: np.ndarray) -> dict[tuple[int, int], int]:
    """By window and position where the pair that starts there first occurred in the window."""
    pairs = [[tuple(row[i : i + 2]) for i in range(len(row) - 1)] for row in windows.tolist()]
    count = len(set(documents.tolist()))
    found = {}
    for number, row in enumerate(pairs):
        for position, pair in enumerate(row):
            others = {int(documents[other]) for other, words in enumerate(pairs) if pair in words}
            is_rare = len(others) <= max(1, count // 50)
            if min(pair) >= 3 and is_rare and row.index(pair) < position:
                found[number, position] = row.index(pair)
    return found


def test_a_natural_repeat_is_a_rare_pair_that_came_before_in_the_window() -> None:
    windows = torch.tensor(
        [
            [0, 7, 8, 9, 7, 8, 7, 8, 1],  # 7 8 at 4 and at 6, first at 1
            [5, 6, 3, 5, 6, 4, 4, 4, 1],  # 5 6 at 3, but another document has it too; 4 4 at 6
            [5, 6, 0, 1, 0, 1, PAD, PAD, PAD],  # special tokens do not count
            [9, 3, 7, 8, 3, 3, 3, 5, 1],  # 7 8 came before in its document, not in this window; 3 3 at 5
        ]
    )
    documents = np.array([2, 5, 8, 2])
    found = first_occurrences(text_windows(windows, documents))
    expected = torch.full((4, 8), -1)
    expected[0, 4], expected[0, 6], expected[1, 6], expected[3, 5] = 1, 1, 5, 4
    assert torch.equal(found, expected)


def test_a_pair_that_one_in_fifty_documents_has_is_rare() -> None:
    windows = torch.arange(3, 303).view(100, 3)[:, [0, 1, 2, 0, 1]].clone()
    for common in (2, 3):
        windows[:common] = windows[0]
        found = first_occurrences(text_windows(windows, np.arange(100)))
        assert ((found >= 0).sum(1) == 1).sum() == (100 if common == 2 else 97)


def test_scores_and_gap_by_hand() -> None:
    model, windows, documents = (
        exact(random_model(context_size=12)),
        names(9, 13, 40),
        np.array([0, 0, 1, 1, 1, 2, 3, 3, 4]),
    )
    windows[4, 11:] = PAD
    result, firsts = scored(model, windows=text_windows(windows, documents)), by_hand(windows, documents)
    assert len(firsts) >= 12
    assert result.text_repeats == len(firsts)
    assert result.text_documents == len({documents[n] for n, _ in firsts})
    with torch.no_grad():
        output = model(windows[:, :-1])
        losses = -output.logits.log_softmax(-1)
    number, sums, uniform = SCORES.index("induction"), np.zeros((3, 2)), []
    differences = np.zeros((3, len(windows)))
    for (n, t), first in firsts.items():
        sources = [s + 1 for s in range(t - 1) if windows[n, s] == windows[n, t]]
        sums += output.attention_weights[n, :, :, t, sources].sum(-1).numpy()
        uniform.append(len(sources) / (t + 1))
        target = windows[n, t + 1]
        differences[0, n] += losses[n, first, target] - losses[n, t, target]
        differences[1, n] += 1
    assert result.text_scores is not None
    assert result.text_uniform is not None
    np.testing.assert_allclose(result.text_scores[..., number], sums / np.count_nonzero(uniform), rtol=1e-6)
    assert result.text_uniform[number] == pytest.approx(np.sum(uniform) / np.count_nonzero(uniform))
    means, errors = clustered_means(differences[:1], differences[1], documents)
    assert (result.text_gap, result.text_gap_error) == pytest.approx((means[0], errors[0]))


def test_a_model_of_the_current_token_alone_has_no_gap() -> None:
    """Without attention, and with positions that only attention sees, both places of a pair are predicted alike."""
    model = exact(random_model(positions="rotary", context_size=12))
    for block in model.blocks:
        block.attention.output.weight.data.zero_()
    result = scored(model, windows=text_windows(names(9, 13, 40), np.arange(9)))
    assert float(result.text_gap or 0) == pytest.approx(0, abs=1e-12)
    assert float(result.text_gap_error or 0) == pytest.approx(0, abs=1e-12)


def test_of_many_windows_some_are_read_a_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows, documents = random_model(context_size=12), names(10, 13, 40), np.arange(10)
    monkeypatch.setattr(head_scores, "MOST_TEXT_TOKENS", 5 * 13)
    tokens = repeated_tokens(200, 5, 7, seed=0, start=0, first=3)
    whole = score_heads(model, tokens, text_windows(windows, documents))
    assert whole.text_repeats == len(by_hand(windows[::2], documents[::2]))
    monkeypatch.setattr(head_scores, "TOKENS_AT_ONCE", 40)
    parts = score_heads(model, tokens, text_windows(windows, documents))
    for name, values in whole.arrays().items():
        np.testing.assert_allclose(parts.arrays()[name], values, atol=1e-5, equal_nan=True)


def test_compositions_are_those_of_whole_matrices(model: Transformer) -> None:
    result = composition_scores(model)
    row = list(result.rows())[1]
    assert [row[name] for name in ("layer", "head", "later_layer", "later_head", "kind")] == [0, 0, 1, 0, "k"]
    assert (row["score"], row["chance"]) == (result.scores[0, 1], model.embedding_size**-0.5)
    for (layer, head, later_layer, later_head), scores in zip(result.pairs, result.scores, strict=True):
        assert layer < later_layer
        ov, (later_ov, later_qk) = circuits(model, layer, head)[0], circuits(model, later_layer, later_head)
        expected = [
            np.linalg.norm(ov @ later) / np.linalg.norm(ov) / np.linalg.norm(later)
            for later in (later_qk, later_qk.T, later_ov)
        ]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_pairs_of_heads() -> None:
    assert pair_list(2, 2).tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert len(pair_list(4, 3)) == 9 * (3 + 2 + 1)
    single = composition_scores(untrained_model(num_layers=1, embedding_size=8))
    assert (single.scores.shape, single.holds) == ((0, 3), True)


def test_a_head_that_writes_nothing_has_no_composition() -> None:
    result = composition_scores(untrained_model(num_layers=2, num_heads=2, zero_output_init=True))
    assert np.isnan(result.scores).all()
    assert result.holds


def test_compositions_of_random_weights_are_chance() -> None:
    result = composition_scores(
        untrained_model(300, embedding_size=128, num_layers=2, num_heads=4, d_key=32, d_value=32)
    )
    assert result.chance == pytest.approx(128**-0.5)
    np.testing.assert_allclose(result.scores / result.chance, 1, atol=0.1)
