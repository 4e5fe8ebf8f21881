"""The distribution of the next token against `transformers`, and draws against the distribution."""

import math
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lumiere.errors import LumiereError
from lumiere.generation.sampling import Sampling, draw, largest, probabilities

TEMPERATURES = [1.0, 0.7, 1.9]
TOP_KS = [None, 1, 2, 5, 50, 10**6]
TOP_PS = [None, 1e-6, 0.3, 0.9, 1.0]


def sample(logits_V: torch.Tensor, sampling: Sampling, random: Random) -> int:
    """One draw of one row."""
    return draw(logits_V[None], sampling, [random.random()])[0]


def theirs(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The same by the classes of `transformers`, in the order in which its `generate` applies them."""
    scores: Any = logits_V[None]
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)  # type: ignore[arg-type]
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)  # type: ignore[arg-type]
    if sampling.top_p is not None:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)  # type: ignore[arg-type]
    if sampling.min_p is not None:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)  # type: ignore[arg-type]
    if sampling.typical_p is not None:
        scores = TypicalLogitsWarper(sampling.typical_p)(None, scores)  # type: ignore[arg-type]
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("top_p", TOP_PS)
def test_the_distribution_is_that_of_transformers(temperature: float, top_k: int | None, top_p: float | None) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0, 30.0):
        logits_V = scale * torch.randn(60, generator=generator)
        # An id that is not used, as `generate` masks it.
        logits_V[7] = -torch.inf
        actual, expected = probabilities(logits_V, sampling), theirs(logits_V, sampling)
        assert torch.equal(actual > 0, expected > 0)
        torch.testing.assert_close(actual, expected)
        # Rounded to whole numbers, many are tied; which of them top-p keeps is left to the sort.
        ties_V = logits_V.round()
        torch.testing.assert_close(
            probabilities(ties_V, sampling).sort().values, theirs(ties_V, sampling).sort().values
        )


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 20}, {"top_p": 0.9}])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.02, 0.4, 1.0])
@pytest.mark.parametrize("typical_p", [None, 0.05, 0.5, 0.95])
def test_min_p_and_typical_p_are_those_of_transformers(
    settings: dict[str, Any], min_p: float | None, typical_p: float | None
) -> None:
    sampling = Sampling(**settings, min_p=min_p, typical_p=typical_p)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 5.0):
        logits_V = scale * torch.randn(60, generator=generator)
        logits_V[7] = -torch.inf
        actual, expected = probabilities(logits_V, sampling), theirs(logits_V, sampling)
        assert torch.equal(actual > 0, expected > 0)
        torch.testing.assert_close(actual, expected)


def test_rows_are_independent() -> None:
    logits_BV = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(0.8, 20, 0.9, 0.01, 0.9)
    alone = torch.stack([probabilities(logits_V, sampling) for logits_V in logits_BV])
    assert torch.equal(probabilities(logits_BV, sampling), alone)


def test_by_hand() -> None:
    logits_V = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()

    def rounded(**settings: Any) -> list[float]:
        return [round(value, 4) for value in probabilities(logits_V, Sampling(**settings)).tolist()]

    assert rounded() == [0.5, 0.1, 0.3, 0.1]
    # Temperature 1/2 squares the odds: 25 : 1 : 9 : 1.
    assert rounded(temperature=0.5) == [0.6944, 0.0278, 0.25, 0.0278]
    assert rounded(top_k=2) == [0.625, 0.0, 0.375, 0.0]
    # All that are tied with the third stay.
    assert rounded(top_k=3) == [0.5, 0.1, 0.3, 0.1]
    assert rounded(top_p=0.5) == [1.0, 0.0, 0.0, 0.0]
    assert rounded(top_p=0.7) == [0.625, 0.0, 0.375, 0.0]
    # Top-p works on what temperature and top-k have left: 0.625 is less than 0.63, so both stay.
    assert rounded(top_k=2, top_p=0.62) == [1.0, 0.0, 0.0, 0.0]
    assert rounded(top_k=2, top_p=0.63) == [0.625, 0.0, 0.375, 0.0]
    assert rounded(temperature=0.5, top_p=0.69) == [1.0, 0.0, 0.0, 0.0]


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30),
    st.floats(1e-3, 50),
    st.none() | st.integers(1, 40),
    st.none() | st.floats(0, 1, exclude_min=True),
)
def test_laws(values: list[float], temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits_V = torch.tensor(values)
    before = logits_V.clone()
    kept_V = probabilities(logits_V, Sampling(temperature, top_k, top_p))
    assert torch.equal(logits_V, before)
    assert math.isclose(kept_V.sum().item(), 1, abs_tol=1e-5)
    all_V = probabilities(logits_V, Sampling(temperature))
    some = kept_V > 0
    # The most probable stay. Of those that are tied, in float32, some may stay and others go.
    assert logits_V[some].max() > logits_V.max() - 1e-4
    assert not (~some).any() or logits_V[some].min() > logits_V[~some].max() - 1e-4
    if top_k is None:
        assert all_V[some].sum() >= (top_p or 1) - 1e-4
    torch.testing.assert_close(kept_V[some], all_V[some] / all_V[some].sum(), rtol=1e-4, atol=1e-6)


def test_greedy_takes_the_likeliest() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, 2.0])
    greedy = Sampling(temperature=0, top_k=3, top_p=0.1)
    assert draw(logits_V[None], greedy, [0.99]) == [1]
    assert probabilities(logits_V, greedy).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits_V = torch.tensor([-80.0, 40.0, 90.0, -torch.inf])
    assert probabilities(logits_V, Sampling(temperature)).tolist() == [0, 0, 1, 0]
    assert sample(logits_V, Sampling(temperature), Random(0)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "the temperature must be 0 or more, not -0.1"),
        ({"temperature": math.inf}, "the temperature must be"),
        ({"temperature": math.nan}, "the temperature must be"),
        ({"top_k": 0}, "top-k must be at least 1, not 0"),
        ({"top_p": 0.0}, "top-p must be more than 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top-p must be"),
        ({"top_p": math.nan}, "top-p must be"),
        ({"min_p": -0.1}, "min-p must be from 0 to 1, not -0.1"),
        ({"min_p": 1.1}, "min-p must be"),
        ({"min_p": math.nan}, "min-p must be"),
        ({"typical_p": 0.0}, "typical-p must be more than 0 and less than 1, not 0.0"),
        ({"typical_p": 1.0}, "typical-p must be"),
        ({"repetition_penalty": 0.0}, "the repetition penalty must be more than 0, not 0.0"),
        ({"repetition_penalty": math.inf}, "the repetition penalty must be"),
        ({"no_repeat_ngram_size": 0}, "the size of n-grams that may not repeat must be at least 1, not 0"),
    ],
)
def test_refused_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(LumiereError) as caught:
        Sampling(**settings)  # type: ignore[arg-type]
    assert caught.value.message.startswith(message)
    assert caught.value.hint


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5, top_k=4), Sampling(top_p=0.8)])
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Chi-square over 2,000 draws, far beyond its 99.9 % point for up to 5 degrees of freedom (20.5)."""
    logits_V = torch.tensor([2.0, 1.0, 0.0, 1.5, -1.0, 0.5])
    random = Random(0)
    draws = [sample(logits_V, sampling, random) for _ in range(2000)]
    expected_V = probabilities(logits_V, sampling).double() * len(draws)
    counts_V = torch.bincount(torch.tensor(draws), minlength=6).double()
    possible = expected_V > 0
    assert not counts_V[~possible].any()
    assert ((counts_V - expected_V)[possible] ** 2 / expected_V[possible]).sum() < 20.5


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_k": 5, "top_p": 0.7},
        {"top_k": 9, "min_p": 0.1},
        {"top_k": 60, "top_p": 0.9, "min_p": 0.02},
        {"top_k": 30, "typical_p": 0.6},
        {"top_k": 1, "top_p": 0.1},
    ],
)
@pytest.mark.parametrize("rounded", [False, True])
def test_the_shorter_way_after_top_k_draws_the_same_distribution(settings: dict[str, Any], rounded: bool) -> None:
    """Every number of an even grid; the share of a token is its probability, also where tokens are tied."""
    logits_V = torch.randn(400, generator=torch.Generator().manual_seed(5))
    if rounded:
        logits_V = logits_V.round()
    sampling, num_draws = Sampling(0.9, **settings), 4000
    drawn = draw(logits_V.expand(num_draws, -1), sampling, [(i + 0.5) / num_draws for i in range(num_draws)])
    shares_V = torch.bincount(torch.tensor(drawn), minlength=400) / num_draws
    torch.testing.assert_close(shares_V, probabilities(logits_V, sampling), atol=1.5 / num_draws, rtol=0)


@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 2**32))
def test_the_largest_and_their_ties_are_found(vocab_size: int, count: int, seed: int) -> None:
    logits_BV = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits_BV[1:3] = logits_BV[1:3].round()
    logits_BV[3, 1:] = -torch.inf
    count = min(count, vocab_size)
    values_BN, ids_BN = largest(logits_BV.numpy(), count)
    for logits_V, values_N, ids_N in zip(logits_BV, values_BN, ids_BN, strict=True):
        in_order_V = sorted(enumerate(logits_V.tolist()), key=lambda pair: (-pair[1], -pair[0]))
        expected = [(i, value) for i, value in in_order_V if value >= in_order_V[count - 1][1] and value > -torch.inf]
        assert list(zip(ids_N.tolist(), values_N.tolist(), strict=True))[: len(expected)] == expected
        assert all(value < in_order_V[count - 1][1] or value == -torch.inf for value in values_N[len(expected) :])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling(top_k=3, top_p=0.9)])
def test_the_last_number_below_one_draws_no_token_that_was_left_out(sampling: Sampling) -> None:
    logits_V = torch.tensor([1.0, 0.0, 0.5, -40.0, -torch.inf])
    possible = set(probabilities(logits_V, sampling).nonzero().flatten().tolist())
    assert draw(logits_V[None], sampling, [math.nextafter(1, 0)])[0] in possible
    assert draw(logits_V[None], sampling, [0.0])[0] in possible


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    """Ties in one row make the others' candidates no more."""
    logits_BV = torch.randn(4, 128, generator=torch.Generator().manual_seed(6))
    logits_BV[2] = logits_BV[2].round()
    random = Random(1)
    for sampling in (Sampling(), Sampling(top_k=10), Sampling(top_k=10, top_p=0.8), Sampling(0)):
        for _ in range(50):
            numbers = [random.random() for _ in range(4)]
            alone = [draw(logits_BV[i : i + 1], sampling, numbers[i : i + 1])[0] for i in range(4)]
            assert draw(logits_BV, sampling, numbers) == alone
