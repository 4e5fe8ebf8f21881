"""Activation patching: many cells at once against a hook in a whole forward pass, laws, and circuits that are known."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lumiere.components.hooks import Hook, hooked, run_with_cache
from lumiere.errors import LumiereError
from lumiere.interpret.metrics import METRIC_NAMES, METRICS
from lumiere.interpret.patching import BY, KINDS, SITES, Patching, correlations, patch
from lumiere.interpret.prompts import PromptPairs, pair_up
from lumiere.models.transformer import Transformer
from tests.interpret.circuits import INDUCTION, PREVIOUS
from tests.models.build import EACH_VARIANT, VARIANTS, make_model

CLEAN = [[0, 5, 6, 7, 8, 9, 3, 4], [0, 2, 6, 7, 1, 9, 3, 4]]
CORRUPT = [[0, 5, 10, 7, 8, 9, 3, 4], [0, 2, 6, 7, 11, 12, 3, 4]]
PAIRS = pair_up(CLEAN, CORRUPT, [3, 4], [5, 6], position=-2)


@cache
def build(variant: str) -> Transformer:
    torch.manual_seed(1)
    return make_model(**VARIANTS[variant]).double()


@pytest.fixture(params=EACH_VARIANT)
def model(request: pytest.FixtureRequest) -> Transformer:
    return build(request.param)


def difference(model: Transformer, tokens: Tensor, hooks: dict[str, Hook] | None = None) -> Tensor:
    """The logit difference of each pair, in a whole forward pass."""
    with torch.no_grad(), hooked(model, hooks or {}):
        logits = model(tokens).logits[:, -2]
    rows = torch.arange(len(tokens))
    return logits[rows, torch.tensor([3, 4])] - logits[rows, torch.tensor([5, 6])]


def put(place: Any, taken: Tensor) -> Hook:
    def replace(activation: Tensor) -> Tensor:
        changed = activation.clone()
        changed[place] = taken[place]
        return changed

    return replace


UNIT_1 = {"attn.hook_pattern": np.s_[:, 1]}
"""Where unit 1 of the sites is whose units are not along axis 2."""


@pytest.mark.parametrize("site", SITES)
def test_every_cell_is_a_hook_in_a_whole_forward_pass(site: str, model: Transformer) -> None:
    """At every position and layer, and for unit 1 (of all or at position 4), in both directions."""
    hook = SITES[site].hook
    by = "both" if SITES[site].unit else "position"
    settings = model.settings
    has_mid = settings.feedforward != "none" and not settings.parallel_blocks
    if (site == "resid_mid" and not has_mid) or (site in ("mlp_out", "neurons") and settings.feedforward == "none"):
        with pytest.raises(LumiereError):
            patch(model, PAIRS, site, by)
        return
    result = patch(model, PAIRS, site, by, "denoising", units=[0] if site in ("k", "v") else [1])
    assert max(receipt.error for receipt in result.receipts) < 1e-12
    with torch.no_grad():
        _, found = run_with_cache(model, PAIRS.clean)
    unit = result.units[0] if result.units else slice(None)
    for layer in range(model.num_layers):
        name = f"blocks.{layer}.{hook}"
        for position in (2, 4, 6):
            place = np.s_[:, unit, position] if hook == "attn.hook_pattern" else np.s_[:, position, unit]
            expected = difference(model, PAIRS.corrupt, {name: put(place, found[name])})
            np.testing.assert_allclose(result.patched[layer, 0, position], expected, atol=1e-12, rtol=1e-12)


def effects(model: Transformer, site: str, by: str = "layer", pairs: PromptPairs = PAIRS, **options: Any) -> np.ndarray:
    return patch(model, pairs, site, by, **options).effects


@pytest.mark.parametrize("kind", ["denoising", "noising", "tracing"])
def test_laws(kind: str, model: Transformer) -> None:
    """A site that cuts every path carries all; equal cuts have equal effects; the past and the unseen carry nothing."""
    # Noise moves a logit difference either way, which leaves nothing to divide by.
    metric = "kl" if kind == "tracing" else None
    np.testing.assert_allclose(effects(model, "resid_pre", kind=kind, metric=metric), 1, atol=1e-12)
    np.testing.assert_allclose(
        effects(model, "z", kind=kind, metric=metric),
        effects(model, "attn_out", kind=kind, metric=metric),
        atol=1e-12,
        rtol=1e-12,
    )
    by_position = effects(model, "resid_post", "position", kind=kind, metric=metric)
    assert (by_position[:, :, [0, 1, 7]] == 0).all()
    assert by_position[-1, 0, 6] == pytest.approx(1)
    assert abs(by_position[-1, 0, :6]).max() < 1e-12
    assert abs(by_position[0]).max() > 1e-3


def test_pattern_and_values_are_all_that_a_head_reads(model: Transformer) -> None:
    with torch.no_grad():
        _, found = run_with_cache(model, PAIRS.clean)
    names = [f"blocks.1.attn.hook_{leaf}" for leaf in ("pattern", "v")]
    both = difference(model, PAIRS.corrupt, {name: put(..., found[name]) for name in names})
    result = patch(model, PAIRS, "z", "layer", layers=[1])
    np.testing.assert_allclose(result.patched[0, 0, 0], both, atol=1e-12)


def test_keys_of_grouped_heads_are_patched_for_the_group() -> None:
    model = build("grouped queries")
    result = patch(model, PAIRS, "k", "unit")
    assert (result.effects.shape, result.unit, result.unit_label(1, 0)) == ((2, 2, 1), "G", "L1G0")
    assert patch(model, PAIRS, "q", "unit").unit == "H"


def test_metrics_and_intervals() -> None:
    """The normalized effect is a ratio of sums, and the metric's sign does not matter."""
    model = build("card")
    found = {metric: patch(model, PAIRS, "z", "unit", metric=metric) for metric in METRIC_NAMES}
    np.testing.assert_allclose(found["loss"].effects, found["log-probability"].effects)
    np.testing.assert_allclose(found["loss"].clean, -found["log-probability"].clean)
    np.testing.assert_allclose(found["kl"].clean, 0, atol=1e-12)
    one = found["probability"]
    ratio = (one.patched - one.corrupt).sum(-1) / (one.clean - one.corrupt).sum()
    np.testing.assert_allclose(one.effects, ratio)
    assert np.isnan(one.low).all()
    with torch.no_grad():
        by_hand = METRICS["probability"](model(PAIRS.clean).logits[:, -2], PAIRS)
    np.testing.assert_allclose(one.clean, by_hand)
    many = pair_up(CLEAN * 5, CORRUPT * 5, [3, 4] * 5, [5, 6] * 5)
    result = patch(model, many, "z", "unit")
    assert ((result.low <= result.effects) & (result.effects <= result.high)).all()
    assert (result.low < result.high).any()
    assert np.isnan(patch(model, pair_up(CLEAN * 5, CORRUPT * 5, [3, 4] * 5, groups=[0, 1] * 5), "z").low).all()


def scaled(model: Transformer, size: float) -> Transformer:
    """A copy whose corrupt tokens 10 to 12 are `size` times as far from the clean ones."""
    from copy import deepcopy

    other = deepcopy(model)
    weight = other.token_embedding.weight.data
    for clean, corrupt in ((6, 10), (1, 11), (9, 12)):
        weight[corrupt] = weight[clean] + size * (weight[corrupt] - weight[clean])
    return other


@pytest.mark.parametrize(("site", "by"), [("resid_mid", "position"), ("k", "unit"), ("pattern", "unit")])
@pytest.mark.parametrize("kind", ["denoising", "noising"])
def test_the_error_of_attribution_patching_is_of_second_order(site: str, by: str, kind: str) -> None:
    errors = []
    for size in (0.1, 0.01):
        result = patch(scaled(build("layer norm, biases"), size), PAIRS, site, by, kind, attribution=True)
        assert result.estimates is not None
        gap = abs((result.clean - result.corrupt).sum())
        errors.append(gap * abs(result.estimates - result.effects).max())
    assert errors[1] < errors[0] / 50
    assert result.pearson is not None
    assert result.pearson > 0.99
    assert result.gradient_at == ("corrupt" if kind == "denoising" else "clean")


def test_attribution_is_exact_where_the_model_is_linear() -> None:
    """Without norms, the last layer's stream is read by a matrix."""
    result = patch(build("attention only"), PAIRS, "resid_post", "position", attribution=True)
    assert result.estimates is not None
    np.testing.assert_allclose(result.estimates[-1], result.effects[-1], atol=1e-12)


def test_noise_is_on_the_tokens_that_differ_and_the_same_for_every_cell() -> None:
    model = build("card")
    options: dict[str, Any] = {"metric": "kl", "kind": "tracing"}
    result = patch(model, PAIRS, "resid_pre", "position", seed=1, **options)
    # Both tokens of the second pair, restored one at a time and with all others.
    assert result.clean.shape == (20,)
    assert np.ptp(result.clean[::2]) < 1e-12
    assert np.ptp(result.corrupt[::2]) > 1e-3
    np.testing.assert_allclose(result.patched[0, 0, 2, ::2], result.clean[::2], atol=1e-12)
    again, other = (patch(model, PAIRS, "resid_pre", "layer", seed=seed, **options) for seed in (1, 2))
    np.testing.assert_allclose(again.corrupt, result.corrupt)
    assert abs(other.corrupt - result.corrupt).max() > 1e-3
    assert not np.isnan(result.low).all()


def by_head(
    circuit: Transformer, clean: Sequence[int], corrupt: Sequence[int], site: str
) -> dict[tuple[int, int], float]:
    """The heads that carry anything, and how much."""
    result = patch(circuit, pair_up([clean], [corrupt]).with_predictions(circuit), site, "unit")
    return {
        (layer, head): round(float(result.effects[layer, head, 0]), 6)
        for layer in range(2)
        for head in range(4)
        if abs(result.effects[layer, head, 0]) > 1e-6
    }


def test_the_heads_of_an_induction_circuit(circuit: Transformer) -> None:
    """Where the copied token changes, its value carries all; where the matching place moves, the key does."""
    assert by_head(circuit, [0, 5, 6, 7, 8, 5], [0, 5, 9, 7, 8, 5], "v") == {INDUCTION: 1}
    moved = [0, 5, 6, 7, 8, 9, 5], [0, 7, 6, 5, 8, 9, 5]
    assert by_head(circuit, *moved, "k") == {INDUCTION: 1}
    assert by_head(circuit, *moved, "z") == {PREVIOUS: 1, INDUCTION: 1}


def test_correlations_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, 40).astype(float), generator.normal(size=40)
    expected = stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic
    assert correlations(x, y) == pytest.approx(expected)
    assert np.isnan(correlations(np.ones(3), np.ones(3))).all()


def test_what_cannot_be_patched_is_refused() -> None:
    model = build("card")
    wrong: list[dict[str, Any]] = [
        {"site": "resid"},
        {"by": "head"},
        {"kind": "noise"},
        {"metric": "logits"},
        {"site": "attn_out", "by": "unit"},
        {"metric": "kl", "kind": "noising", "attribution": True},
    ]
    for options in wrong:
        with pytest.raises(LumiereError) as refused:
            patch(model, PAIRS, **options)
        assert refused.value.hint
    unread = pair_up(CLEAN, CORRUPT, [3, 4], [5, 6], position=1)  # before the prompts differ
    with pytest.raises(LumiereError):
        patch(model, unread)
    assert patch(model, PAIRS, positions=[0, 7]).effects.tolist() == [[[0, 0]], [[0, 0]]]


def test_rows_are_cells() -> None:
    result: Patching = patch(build("card"), PAIRS, "z", "both", layers=[1], units=[2, 0], positions=[3, 4])
    rows = list(result.rows())
    assert [(row["layer"], row["unit"], row["position"]) for row in rows] == [
        (1, 2, 3), (1, 2, 4), (1, 0, 3), (1, 0, 4)
    ]  # fmt: skip
    assert [row["effect"] for row in rows] == result.effects.ravel().tolist()
    assert {kind for kind in KINDS if kind in BY} == set()
