"""The distribution of the next token against `transformers`, and draws against the distribution."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lumiere.errors import LumiereError
from lumiere.generation.sampling import Sampling, probabilities, sample

TEMPERATURES = [1.0, 0.7, 1.9]
TOP_KS = [None, 1, 2, 5, 50, 10**6]
TOP_PS = [None, 1e-6, 0.3, 0.9, 1.0]


def theirs(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The same by the classes of `transformers`, in the order in which its `generate` applies them."""
    scores: Any = logits_V[None]
    scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)  # type: ignore[arg-type]
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)  # type: ignore[arg-type]
    if sampling.top_p is not None:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)  # type: ignore[arg-type]
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
        # Rounded to whole numbers, many are tied.
        ties_V = logits_V.round()
        torch.testing.assert_close(probabilities(ties_V, sampling), theirs(ties_V, sampling))


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
    # The likeliest stay; those that are tied with the last one may stay or go.
    assert logits_V[some].max() == logits_V.max()
    assert not (~some).any() or logits_V[some].min() > logits_V[~some].max() - 1e-4
    if top_k is None:
        assert all_V[some].sum() >= (top_p or 1) - 1e-4
    torch.testing.assert_close(kept_V[some], all_V[some] / all_V[some].sum(), rtol=1e-4, atol=1e-6)


def test_greedy_takes_the_likeliest() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    logits_V = torch.tensor([0.0, 2.0, 1.0, 2.0])
    greedy = Sampling(temperature=0, top_k=3, top_p=0.1)
    assert sample(logits_V, greedy, generator) == 1
    assert probabilities(logits_V, greedy).tolist() == [0, 1, 0, 0]
    # No draw is spent on it.
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits_V = torch.tensor([-80.0, 40.0, 90.0, -torch.inf])
    assert probabilities(logits_V, Sampling(temperature)).tolist() == [0, 0, 1, 0]
    assert sample(logits_V, Sampling(temperature), torch.Generator()) == 2


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
    generator = torch.Generator().manual_seed(0)
    draws = [sample(logits_V, sampling, generator) for _ in range(2000)]
    expected_V = probabilities(logits_V, sampling).double() * len(draws)
    counts_V = torch.bincount(torch.tensor(draws), minlength=6).double()
    possible = expected_V > 0
    assert not counts_V[~possible].any()
    assert ((counts_V - expected_V)[possible] ** 2 / expected_V[possible]).sum() < 20.5


def test_draws_depend_on_the_generator_only() -> None:
    logits_V = torch.zeros(1000)
    first, again, other = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    drawn = [sample(logits_V, Sampling(), first) for _ in range(5)]
    torch.manual_seed(5)
    assert [sample(logits_V, Sampling(), again) for _ in range(5)] == drawn
    assert [sample(logits_V, Sampling(), other) for _ in range(5)] != drawn
