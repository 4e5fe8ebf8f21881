"""What holds for all analyses: their checks in both precisions; order, basis and later tokens never matter."""

import copy
import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lumiere.components.hooks import HookPoint
from lumiere.evaluation.ngrams import BigramModel
from lumiere.interpret.ablation import MODES, UNITS, ablate
from lumiere.interpret.activations import activations
from lumiere.interpret.attention import COMBINED, WEIGHTED, attention_patterns, combined_attention
from lumiere.interpret.dynamics import METRICS, Texts, follow
from lumiere.interpret.head_scores import composition_scores, repeated_tokens, score_heads
from lumiere.interpret.head_weights import head_weights
from lumiere.interpret.joint_ablation import ablate_together, parse_parts
from lumiere.interpret.lenses import compare_lenses, plain_lens
from lumiere.interpret.logit_attribution import LEVELS, logit_attribution
from lumiere.interpret.logit_lens import logit_lens
from lumiere.interpret.model_diff import ModelDiff, diff_models
from lumiere.interpret.neurons import neuron_examples, token_map
from lumiere.interpret.patching import KINDS, patch
from lumiere.interpret.prompts import pair_up
from lumiere.interpret.result import Result, agreement
from lumiere.interpret.saliency import COMPLETE, saliency
from lumiere.interpret.steering import steer
from lumiere.interpret.summary import summarize
from lumiere.interpret.token_losses import token_losses
from lumiere.models.transformer import Transformer
from lumiere.report.results import as_csv, as_json, as_npz
from tests.interpret.models import BATCHES, TOKENS, nudged, one_row, permuted, rebased, text_windows

BIGRAM = BigramModel.fit(np.array(TOKENS), np.array([0, len(TOKENS)]), vocab_size=320)
REPEATED = repeated_tokens(300, 7, 3, seed=0, start=0, first=3)
WINDOWS = text_windows(torch.cat([REPEATED, REPEATED[:, 1:3]], dim=1), np.array([0, 0, 1]))
TEXTS = Texts(REPEATED, WINDOWS, BATCHES, [TOKENS])
BASELINES = {"mean": np.bincount(range(3, 90), minlength=320), "start": np.eye(320)[0]}

PAIRS = pair_up([TOKENS], [[0, 70, 73, 72, 70, 71, 9, 300, 4, 8]], [71], [9])

Analysis = Callable[[Transformer], Result]
ANALYSES: Mapping[str, Analysis] = {
    "activations": lambda model: activations(model, TOKENS),
    **{f"attention {kind}": lambda model, kind=kind: attention_patterns(model, TOKENS, kind=kind) for kind in WEIGHTED},
    **{f"attention {kind}": lambda model, kind=kind: combined_attention(model, TOKENS, kind=kind) for kind in COMBINED},
    "lens": lambda model: logit_lens(model, TOKENS, sublayers=True, top_k=2),
    **{
        f"logits by {level}": lambda model, level=level: logit_attribution(model, TOKENS, range(10), 71, by=level)
        for level in LEVELS
    },
    "logits versus": lambda model: logit_attribution(model, TOKENS, target=71, versus=9),
    "log probability": lambda model: logit_attribution(model, TOKENS, target=71, log_probability=True),
    "tokens": lambda model: token_losses(model, TOKENS, BIGRAM.unigram, BIGRAM),
    "heads": lambda model: score_heads(model, REPEATED, WINDOWS),
    "composition": composition_scores,
    "weights": lambda model: head_weights(model, directions=2),
    **{f"ablate {unit}": lambda model, unit=unit: ablate(model, BATCHES, unit) for unit in UNITS},
    **{f"ablate {mode}": lambda model, mode=mode: ablate(model, BATCHES, "head", mode) for mode in MODES},
    **{f"patch {kind}": lambda model, kind=kind: patch(model, PAIRS, "z", "unit", kind) for kind in KINDS[:2]},
    "patch estimates": lambda model: patch(model, PAIRS, "attn_out", attribution=True),
    "ablate together": lambda model: ablate_together(model, BATCHES, parse_parts("pairs", model)),
    "neurons": lambda model: neuron_examples(model, BATCHES, 5),
    "token map": lambda model: token_map(model, range(3, 60)),
    "lenses": lambda model: compare_lenses(model, torch.tensor([TOKENS] * 2), {"J": plain_lens(model, "jacobian")}),
    "saliency": lambda model: saliency(model, TOKENS, BASELINES, 7, 71, 9),
    "steer": lambda model: steer(model, torch.linspace(-1, 2, model.embedding_size), 0, [TOKENS], 71, 9, BATCHES),
    "summary": lambda model: summarize(model, BATCHES, np.ones(320)),
    "diff": lambda model: diff_models(model, nudged(model), BATCHES),
    "dynamics": lambda model: follow([1, 2, 4, 8], lambda step: model, list(METRICS), TEXTS),
}
per_analysis = pytest.mark.parametrize("name", ANALYSES)


RESULTS: dict[tuple[str, Transformer], Result] = {}


def computed(name: str, model: Transformer) -> Result:
    """Compute an analysis once for each model, which is kept: by its id, another could be taken for it later."""
    if (name, model) not in RESULTS:
        RESULTS[name, model] = ANALYSES[name](model)
    return RESULTS[name, model]


@per_analysis
def test_checks_hold_and_float32_agrees_with_float64(name: str, model: Transformer, exact_model: Transformer) -> None:
    """And the model and its text are left as they were."""
    before = {tensor: weight.clone() for tensor, weight in model.state_dict().items()}
    batches = copy.deepcopy(BATCHES)
    found, expected = computed(name, model), computed(name, exact_model)
    assert [receipt for receipt in (*found.receipts, *expected.receipts) if not receipt.holds] == []
    assert {receipt.tolerance for receipt in expected.receipts} <= {0, 1e-10, 1e-8, 1e-10 * math.log(320), COMPLETE}
    assert agreement(found, expected).holds
    assert all(torch.equal(weight, before[tensor]) for tensor, weight in model.state_dict().items())
    assert not any(module.is_set for module in model.modules() if isinstance(module, HookPoint))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(BATCHES, batches, strict=True))


@per_analysis
def test_files_hold_the_result(name: str, trained: Transformer) -> None:
    """JSON has finite numbers or null, every row the same columns, and NPZ the arrays themselves."""
    result = computed(name, trained)

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(as_json(result, {}), parse_constant=refused)
    assert [receipt["law"] for receipt in data["receipts"]] == [receipt.check for receipt in result.receipts]
    arrays = result.arrays()
    saved = np.load(io.BytesIO(as_npz(result, {})))
    assert all(
        np.array_equal(saved[name], values, equal_nan=values.dtype.kind == "f") for name, values in arrays.items()
    )
    for name in set(arrays) & set(data):
        values = np.array(data[name], dtype=arrays[name].dtype if arrays[name].dtype.kind in "iu" else float)
        np.testing.assert_allclose(values, np.where(np.isfinite(arrays[name]), arrays[name], np.nan), rtol=1e-6)
    header, *rows = csv.reader(io.StringIO(as_csv(result, {}).decode()))
    assert header
    assert rows
    assert {len(row) for row in rows} == {len(header)}


@pytest.mark.parametrize(
    "name",
    [
        "activations",
        "attention norm-weighted",
        "attention mean",
        "lens",
        "logits by head",
        "tokens",
        "heads",
        "saliency",
        "summary",
    ],
)
def test_a_broken_model_fails_a_check(name: str, model: Transformer) -> None:
    broken = copy.deepcopy(model)
    for parameter in broken.parameters():
        parameter.data.view(-1)[0] = math.nan
    assert not ANALYSES[name](broken).holds


ORDERS = [[1, 0], [0, 1], [1, 0]]
AXES: Mapping[str, Mapping[str, int]] = {
    "attention pattern": {"patterns": 1, "entropy": 1, "mean_distance": 1, "previous": 1},
    "attention norm-weighted": {"patterns": 1, "norms": 1},
    "logits by head": {"heads": 2, "sources": 2},
    "heads": {"scores": 1, "errors": 1, "copying": 1, "text_scores": 1},
    "patch denoising": {"effects": 1},
    "ablate head": {"changes": 1, "standard_errors": 1},
    "summary": {"head_writes": 1},
}


@pytest.mark.parametrize("name", AXES)
def test_permuting_heads_permutes_their_rows(name: str, exact_model: Transformer) -> None:
    orders = ORDERS[: exact_model.num_layers]
    before, after = computed(name, exact_model), ANALYSES[name](permuted(exact_model, orders))
    for field, axis in AXES[name].items():
        shape = (len(orders), 2)
        old, new = (getattr(result, field) for result in (before, after))
        old, new = (values.reshape(shape) if values.ndim == 1 else values for values in (old, new))
        for layer, order in enumerate(orders):
            place = (slice(None),) * (axis - 1) + (layer,)
            expected = np.take(old[place], order, axis=0 if axis == 1 else 1)
            np.testing.assert_allclose(new[place], expected, atol=1e-9, err_msg=field)


@pytest.mark.parametrize(
    ("analysis", "fields"),
    [
        (lambda model, tokens: attention_patterns(model, tokens), ["patterns", "entropy", "distance"]),
        (lambda model, tokens: attention_patterns(model, tokens, kind="value-weighted"), ["patterns", "norms"]),
        (lambda model, tokens: attention_patterns(model, tokens, kind="norm-weighted"), ["patterns", "norms"]),
        (lambda model, tokens: combined_attention(model, tokens, kind="rollout"), ["weights"]),
        (
            lambda model, tokens: logit_lens(model, tokens, sublayers=True, target=71, top_k=2),
            ["top_tokens", "top_probabilities", "target_ranks", "target_probabilities", "entropies", "divergences"],
        ),
        (
            lambda model, tokens: logit_attribution(model, tokens, range(len(tokens)), 71),
            ["logits", "embed", "attention", "heads", "sources", "feedforward", "neurons", "scales"],
        ),
        (token_losses, ["losses", "entropies", "ranks", "predictions", "probabilities"]),
    ],
)
def test_later_tokens_change_nothing(
    analysis: Callable[[Transformer, Sequence[int]], Result], fields: Sequence[str], model: Transformer
) -> None:
    whole = analysis(model, TOKENS)
    for length in (2, 5, 9):
        for field, values in analysis(model, TOKENS[:length]).arrays().items():
            if field in fields:
                expected = whole.arrays()[field][tuple(map(slice, values.shape))]
                np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4, err_msg=field)


@pytest.mark.parametrize(
    ("analysis", "fields"),
    [
        (lambda model, **chosen: attention_patterns(model, TOKENS, **chosen), ["patterns", "entropy", "first"]),
        (lambda model, **chosen: score_heads(model, REPEATED, WINDOWS, **chosen), ["scores", "copying", "text_scores"]),
    ],
)
def test_layers_and_heads_are_chosen(analysis: Any, fields: Sequence[str], model: Transformer) -> None:
    everything, part = analysis(model), analysis(model, layers=[1, 0], heads=[1])
    assert (part.layers, part.heads) == ((1, 0), (1,))
    for field in fields:
        expected = getattr(everything, field)[np.ix_([1, 0], [1])]
        np.testing.assert_allclose(getattr(part, field), expected, atol=1e-6, err_msg=field)


@pytest.mark.parametrize(
    ("analysis", "fields"),
    [
        (lambda model, batches: ablate(model, batches, "head", "zero"), ["changes", "standard_errors"]),
        (lambda model, batches: ablate(model, batches, "feedforward", "mean"), ["changes", "standard_errors"]),
        (lambda model, batches: diff_models(model, nudged(model), batches), ["losses", "cka", "match_divergences"]),
        (summarize, ["writes", "head_writes", "largest_activations", "num_windows", "num_tokens"]),
        (lambda model, batches: neuron_examples(model, batches, 5), ["neurons", "activations", "promoted"]),
    ],
)
def test_batches_make_no_difference(analysis: Any, fields: Sequence[str], exact_model: Transformer) -> None:
    one_by_one = [one_row(batch, row) for batch in reversed(BATCHES) for row in range(len(batch.tokens))]
    together, apart = (analysis(exact_model, batches).as_dict() for batches in (BATCHES, one_by_one))
    for field in fields:
        np.testing.assert_allclose(apart[field], together[field], atol=1e-9, err_msg=field)


@pytest.mark.parametrize("name", ["heads", "composition", "attention pattern", "diff"])
def test_a_head_has_no_basis_of_keys_and_values(name: str, exact_model: Transformer) -> None:
    """Q M and K M^-T, V N and N^-1 O are the same head."""
    if exact_model.settings.rotary_size:
        pytest.skip("rotary positions turn keys in a basis of their own")
    before, after = computed(name, exact_model), ANALYSES[name](rebased(exact_model))
    if isinstance(before, ModelDiff):
        after = diff_models(exact_model, rebased(exact_model), BATCHES)
        assert after.heads is not None
        assert max(after.heads.ov_changes.max(), after.heads.qk_changes.max()) < 1e-9
        assert after.weights.change_norms.max() > 0.1
        return
    for field, values in before.arrays().items():
        np.testing.assert_allclose(after.arrays()[field], values, atol=1e-6, err_msg=field)
