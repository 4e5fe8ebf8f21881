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
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lumiere.errors import LumiereError
from lumiere.generation.sampling import Repetition, Sampling, draw, largest, probabilities

CPU = torch.device("cpu")
TOP_KS = [None, 1, 2, 5, 50, 10**6]
TOP_PS = [None, 1e-6, 0.3, 0.9, 1.0]
NUCLEUS = [{"temperature": t, "top_k": k, "top_p": p} for t in (1.0, 0.7, 1.9) for k in TOP_KS for p in TOP_PS]
OTHERS: list[dict[str, Any]] = [
    {**settings, "min_p": min_p, "typical_p": typical_p}
    for settings in ({}, {"temperature": 0.6}, {"top_k": 20}, {"top_p": 0.9})
    for min_p in (None, 0.0, 0.02, 0.4, 1.0)
    for typical_p in (None, 0.05, 0.5, 0.95)
]
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}


def theirs(logits_V: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The same by the classes of `transformers`, in the order in which its `generate` applies them."""
    scores: Any = logits_V[None]
    for name, warper in WARPERS.items():
        if settings.get(name) is not None:
            scores = warper(settings[name])(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("settings_table", [NUCLEUS, OTHERS], ids=["nucleus", "others"])
def test_the_distribution_is_that_of_transformers(settings_table: list[dict[str, Any]]) -> None:
    generator = torch.Generator().manual_seed(0)
    for settings in settings_table:
        for scale in (0.1, 3.0, 30.0):
            logits_V = scale * torch.randn(60, generator=generator)
            logits_V[7] = -torch.inf  # an unused id, as `generate` masks it
            actual, expected = probabilities(logits_V, Sampling(**settings)), theirs(logits_V, settings)
            assert torch.equal(actual > 0, expected > 0), settings
            torch.testing.assert_close(actual, expected)
            if "typical_p" not in settings:
                # Rounded to whole numbers, many are tied; which of them top-p keeps is left to the sort.
                ties_V = logits_V.round()
                ours = probabilities(ties_V, Sampling(**settings)).sort().values
                torch.testing.assert_close(ours, theirs(ties_V, settings).sort().values)


@pytest.mark.parametrize("temperature", [0, 1e-3, 1e-30, 1e-45, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits_V = torch.tensor([-80.0, 40.0, 90.0, -torch.inf])
    assert probabilities(logits_V, Sampling(temperature)).tolist() == [0, 0, 1, 0]
    assert draw(logits_V[None], Sampling(temperature), [0.99]) == [2]


def test_greedy_ignores_the_other_controls_and_takes_the_first_of_ties() -> None:
    logits_V, greedy = torch.tensor([0.0, 2.0, 1.0, 2.0]), Sampling(temperature=0, top_k=3, top_p=0.1)
    assert draw(logits_V[None], greedy, [0.99]) == [1]
    assert probabilities(logits_V, greedy).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.inf, math.nan]),
        ("top_k", [0]),
        ("top_p", [0.0, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("typical_p", [0.0, 1.0]),
        ("repetition_penalty", [0.0, math.inf]),
        ("no_repeat_ngram_size", [0]),
    ],
)
def test_refused_settings(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(LumiereError) as caught:
            Sampling(**{name: value})  # pyright: ignore[reportArgumentType]
        assert str(value) in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_p": 0.8},
        {"top_k": 5},
        {"top_k": 5, "top_p": 0.7},
        {"top_k": 9, "min_p": 0.1},
        {"top_k": 60, "top_p": 0.9, "min_p": 0.02},
        {"top_k": 30, "typical_p": 0.6},
        {"top_k": 1, "top_p": 0.1},
        {"top_k": 5, "top_p": 1e-20},
    ],
)
@pytest.mark.parametrize("rounded", [False, True])
def test_draws_follow_the_distribution(settings: dict[str, Any], rounded: bool) -> None:
    """Over an even grid of numbers a token's fraction is its probability, also where tokens are tied."""
    logits_V = torch.randn(400, generator=torch.Generator().manual_seed(5))
    logits_V = logits_V.round() if rounded else logits_V
    sampling, num_draws = Sampling(0.9, **settings), 4000
    drawn = draw(logits_V.expand(num_draws, -1), sampling, [(i + 0.5) / num_draws for i in range(num_draws)])
    fractions_V = torch.bincount(torch.tensor(drawn), minlength=400) / num_draws
    torch.testing.assert_close(fractions_V, probabilities(logits_V, sampling), atol=1.5 / num_draws, rtol=0)


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
def test_the_first_and_last_number_draw_no_token_that_was_dropped(sampling: Sampling) -> None:
    logits_V = torch.tensor([1.0, 0.0, 0.5, -40.0, -torch.inf])
    possible = set(probabilities(logits_V, sampling).nonzero().flatten().tolist())
    assert {draw(logits_V[None], sampling, [number])[0] for number in (0.0, math.nextafter(1, 0))} <= possible


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    """Ties in one row give the other rows no more candidates."""
    logits_BV = torch.randn(4, 128, generator=torch.Generator().manual_seed(6))
    logits_BV[2] = logits_BV[2].round()
    random = Random(1)
    for sampling in (Sampling(), Sampling(top_k=10), Sampling(top_k=10, top_p=0.8), Sampling(0)):
        for _ in range(50):
            numbers = [random.random() for _ in range(4)]
            alone = [draw(logits_BV[i : i + 1], sampling, numbers[i : i + 1])[0] for i in range(4)]
            assert draw(logits_BV, sampling, numbers) == alone


@pytest.mark.parametrize("penalty", [None, 1.3, 0.7])
@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_repetition_is_that_of_transformers(penalty: float | None, size: int | None) -> None:
    """Few ids, so that all repeat; rows that grow, one of which is dropped and one kept twice."""
    sampling = Sampling(repetition_penalty=penalty, no_repeat_ngram_size=size)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 9, (3, 2), generator=generator).tolist()
    repetition = Repetition(rows, sampling, 12, CPU)
    for step in range(25):
        logits_BV = 2 * torch.randn(3, 12, generator=generator)
        logits_BV[:, 11] = -torch.inf
        expected: Any = logits_BV
        if penalty is not None:
            expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(rows), expected)  # type: ignore[arg-type]
        if size is not None:
            expected = NoRepeatNGramLogitsProcessor(size)(torch.tensor(rows), expected)  # type: ignore[arg-type]
        assert torch.equal(repetition.applied(logits_BV), expected)
        if step == 10:
            repetition.keep([2, 0, 2])
            rows = [list(rows[2]), list(rows[0]), list(rows[2])]
        tokens = torch.randint(0, 9, (3,), generator=generator).tolist()
        repetition.append(tokens)
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
