"""Pairs of prompts, metrics by torch's own losses, and intervals by hand and by coverage."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumiere.errors import LumiereError
from lumiere.interpret.bootstrap import FEWEST, ratio_interval, sum_interval
from lumiere.interpret.metrics import METRIC_NAMES, METRICS, default_metric, find_metric
from lumiere.interpret.prompts import PromptPairs, pair_up
from lumiere.models.transformer import Transformer

CLEAN, CORRUPT = [[0, 5, 6, 7], [0, 5, 8, 7]], [[0, 9, 6, 7], [0, 5, 6, 9]]


def make_pairs(**changes: Any) -> PromptPairs:
    options: dict[str, Any] = {"targets": [3, 4], "versus": [5, 3]}
    return pair_up(CLEAN, CORRUPT, **(options | changes))


def test_pairs_know_where_they_differ_and_are_read() -> None:
    pairs = make_pairs(position=-2)
    assert pairs.changed.tolist() == [[False, True, False, False], [False, False, True, True]]
    assert pairs.first_changed == 1
    assert pairs.select([1]).first_changed == 2
    values = torch.arange(2 * 4 * 3).view(2, 4, 3)
    assert torch.equal(pairs.read(values), torch.stack([values[0, 2], values[1, 2]]))
    assert pairs.to(torch.device("meta")).clean.is_meta


@pytest.mark.parametrize(
    ("clean", "corrupt", "changes", "named"),
    [
        ([[1, 2, 3]], [[1, 7, 8, 3]], {}, ["3", "4", "from position 1 2 became 7 8"]),
        ([[1, 2, 3]], [[1, 2]], {}, ["from position 2 3 became nothing"]),
        ([[1, 2]], [[1, 2]], {}, ["same"]),
        ([[1, 2], [1, 2, 3]], [[1, 3], [1, 2, 4]], {}, ["2 and 3 tokens"]),
        (CLEAN, CORRUPT, {"targets": [3, 4], "versus": [5, 4]}, ["itself"]),
    ],
)
def test_prompts_that_do_not_align_are_refused(
    clean: Sequence[Sequence[int]], corrupt: Sequence[Sequence[int]], changes: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(LumiereError) as refused:
        pair_up(clean, corrupt, **changes)
    assert all(name in f"{refused.value.message} {refused.value.hint}" for name in named)


def test_targets_are_what_the_model_predicts(circuit: Transformer) -> None:
    """The induction circuit continues with the token after the earlier copy of the last one."""
    pairs = pair_up([[0, 5, 6, 7, 5]], [[0, 7, 6, 5, 5]]).with_predictions(circuit)
    assert pairs.targets is not None
    assert pairs.versus is not None
    assert (pairs.targets.tolist(), pairs.versus.tolist()) == ([6], [5])
    with pytest.raises(LumiereError, match="same token"):
        pair_up([[0, 5, 6, 7, 5]], [[0, 5, 6, 8, 5]]).with_predictions(circuit)


def test_metrics_are_those_of_torch() -> None:
    pairs = make_pairs()
    torch.manual_seed(0)
    clean_BV, logits = torch.randn(2, 11), torch.randn(5, 2, 11, requires_grad=True)
    by_hand = {
        "logit-difference": torch.stack([logits[:, 0, 3] - logits[:, 0, 5], logits[:, 1, 4] - logits[:, 1, 3]], dim=1),
        "loss": torch.stack(
            [F.cross_entropy(row, torch.tensor([3, 4]), reduction="none") for row in logits],
        ),
        "kl": torch.stack(
            [
                F.kl_div(row.log_softmax(-1), clean_BV.log_softmax(-1), log_target=True, reduction="none").sum(-1)
                for row in logits
            ]
        ),
    }
    by_hand |= {"log-probability": -by_hand["loss"], "probability": (-by_hand["loss"]).exp()}
    assert set(by_hand) == set(METRIC_NAMES)
    for name, expected in by_hand.items():
        found = find_metric(name, clean_BV)(logits, pairs)
        torch.testing.assert_close(found, expected)
        assert torch.autograd.grad(found.sum(), logits)[0].abs().sum() > 0
    assert find_metric("kl", clean_BV)(clean_BV, pairs).abs().max() < 1e-6
    assert default_metric(pairs) == "logit-difference"
    assert default_metric(make_pairs(versus=None)) == "log-probability"


def test_metrics_refuse_what_they_cannot_compare() -> None:
    logits = torch.zeros(2, 11)
    with pytest.raises(LumiereError, match="second token"):
        METRICS["logit-difference"](logits, make_pairs(versus=None))
    with pytest.raises(LumiereError, match="no target"):
        METRICS["loss"](logits, make_pairs(versus=None, targets=None))
    with pytest.raises(LumiereError, match="logit-diff"):
        find_metric("logit-diff", logits)


def test_the_ratio_is_of_sums_and_its_interval_has_the_width_of_the_delta_method() -> None:
    """The standard error of a ratio of means (Cochran 1977, equation 6.9), on many prompts."""
    generator = np.random.default_rng(0)
    below = generator.uniform(1, 3, 400)
    above = np.stack([0.5 * below + generator.normal(0, 0.2, 400), np.zeros(400)])
    found = ratio_interval(above, below, np.arange(400))
    ratios = above.sum(1) / below.sum()
    np.testing.assert_allclose(found.value, ratios)
    residuals = above - ratios[:, None] * below
    errors = residuals.std(axis=1) / np.sqrt(400) / below.mean()
    np.testing.assert_allclose((found.high - found.low) / 2, 1.96 * errors, rtol=0.1)
    assert found.low[1] == found.high[1] == 0
    again = ratio_interval(above, below, np.arange(400))
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    # Ten copies of 40 prompts each, as groups, are no more prompts than 40.
    copied = ratio_interval(np.repeat(above[:, :40], 10, axis=1), np.repeat(below[:40], 10), np.arange(400) // 10)
    single = ratio_interval(above[:, :40], below[:40], np.arange(40))
    np.testing.assert_allclose(copied.high - copied.low, single.high - single.low)


def test_few_prompts_have_no_interval_and_a_small_denominator_is_refused() -> None:
    few, enough = np.arange(FEWEST - 1), np.arange(FEWEST)
    found = ratio_interval(few + 1.0, few + 1.0, few)
    assert (found.value, np.isnan(found.low), np.isnan(found.high)) == (1.0, True, True)
    assert np.isnan(sum_interval(enough + 1.0, np.zeros(FEWEST)).low)
    assert not np.isnan(sum_interval(enough + 1.0, enough).low)
    both_signs = np.where(enough % 2, 1.0, -0.9)
    for values, groups in ((both_signs, enough), (np.zeros(3), np.arange(3)), (np.full(3, np.nan), np.arange(3))):
        with pytest.raises(LumiereError):
            ratio_interval(np.ones(len(values)), values, groups)
