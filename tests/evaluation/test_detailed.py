"""Both evaluations against numpy, a stock Llama, and invariants of averages."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch

from lumiere.data.batches import Windows
from lumiere.data.dataset import Sizes, SplitFacts, TokenizedSplit
from lumiere.errors import LumiereError
from lumiere.evaluation import scoring
from lumiere.evaluation.detailed import DetailedEvaluation, bins_of, calibration, evaluate_in_detail
from lumiere.evaluation.loss import Evaluation, evaluate
from lumiere.evaluation.ngrams import fit_baselines
from lumiere.evaluation.scoring import (
    DocumentTotals,
    GroupSums,
    Protocol,
    Scores,
    paired_difference,
    score,
    score_logits,
    standard_errors,
    strided_windows,
    training_windows,
)
from lumiere.models.transformer import Transformer
from tests import reference
from tests.models.build import stock_llama

CONTEXT, OVERLAP, VOCAB = 6, 2, 40
LENGTHS = [15, 4, 8, 2, 21]
SIZES = Sizes(
    num_bytes=np.array([40, 13, 19, 6, 45]),
    num_words=np.array([8, 2, 4, 1, 8]),
    num_normalized_bytes=np.array([40, 11, 19, 6, 44]),
    num_changed_bytes=np.array([0, 4, 0, 0, 2]),
)


def make_split(seed: int = 0) -> TokenizedSplit:
    draw = np.random.default_rng(seed)
    ids = list(chain(*([0, *draw.integers(3, VOCAB, length - 2).tolist(), 1] for length in LENGTHS)))
    facts = SplitFacts(len(LENGTHS), len(ids), 123, 23, "", 120)
    return TokenizedSplit(np.array(ids, dtype=np.uint16), np.cumsum([0, *LENGTHS]), facts, VOCAB)


SPLIT, TRAIN = make_split(), make_split(1)


def make_model(seed: int = 2, positions: str = "learned") -> Transformer:
    """Build a model with dropout, which an evaluation must not use, and logits that are far apart."""
    torch.manual_seed(seed)
    model = Transformer(VOCAB, 12, CONTEXT, 2, 2, 6, 6, 9, dropout=0.5, positions=positions)  # pyright: ignore
    model.token_embedding.weight.data *= 20
    return model.eval()


def run(model: Transformer, windows: tuple[Windows, Protocol] | None = None, batch_size: int = 4) -> DetailedEvaluation:
    windows = windows or training_windows(SPLIT, CONTEXT, OVERLAP)
    baselines = fit_baselines(TRAIN.ids, TRAIN.offsets, VOCAB)
    return evaluate_in_detail(model, SPLIT, SIZES, *windows, batch_size, TRAIN, baselines)


def run_light(model: Transformer, batch_size: int = 4) -> Evaluation:
    return evaluate(model, training_windows(SPLIT, CONTEXT, OVERLAP)[0], SPLIT.facts, batch_size)


def training_windows_by_hand() -> Iterator[np.ndarray]:
    for document in np.split(SPLIT.ids, SPLIT.offsets[1:-1]):
        for start in range(0, max(1, len(document) - OVERLAP), CONTEXT + 1 - OVERLAP):
            yield document[start : start + CONTEXT + 1]


both = pytest.mark.parametrize(
    "run_either", [run_light, lambda model: run(model).evaluation], ids=["light", "detailed"]
)


def numpy_evaluation(model: Transformer, stride: int, once: bool) -> dict[str, Any]:
    """Evaluate in plain Python, token by token, with a transformer in numpy."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    counts = Counter(t for d in np.split(TRAIN.ids, TRAIN.offsets[1:-1]) for t in d[1:].tolist())
    scored: list[dict[str, float]] = []
    windows: list[list[float]] = []
    for number, ids in enumerate(np.split(SPLIT.ids, SPLIT.offsets[1:-1])):
        document, start, done = ids.tolist(), 0, 0
        while True:
            window = document[start : start + CONTEXT + 1]
            logits, _, _ = reference.transformer(weights, window[:-1], model.settings)
            windows.append([])
            for place, (row, target) in enumerate(zip(logits, window[1:], strict=True), start=1):
                if once and start + place <= done:
                    continue
                likely = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
                loss, rank = -math.log(likely[target]), int((likely > likely[target]).sum())
                windows[-1].append(loss)
                groups = {"position": place, "document": number, "digits": len(str(counts[target] or ""))}
                scored.append({"loss": loss, "rank": rank, "confidence": likely.max(), **groups})
            done = start + len(window) - 1
            if done == len(document) - 1:
                break
            start += stride
    mean = {
        key: {value: np.mean([s["loss"] for s in scored if s[key] == value]) for value in {s[key] for s in scored}}
        for key in ("position", "document", "digits")
    }
    ece = 0.0
    for low in range(15):
        inside = [s for s in scored if low / 15 < s["confidence"] <= (low + 1) / 15]
        ece += abs(sum(s["confidence"] - (s["rank"] == 0) for s in inside)) / len(scored)
    return {
        "loss": np.mean([s["loss"] for s in scored]),
        "accuracy": np.mean([s["rank"] == 0 for s in scored]),
        "accuracy_at_5": np.mean([s["rank"] < 5 for s in scored]),
        "ece": ece,
        "num_tokens": len(scored),
        "windows": windows,
        **mean,
    }


@pytest.mark.parametrize("stride", [None, 1, 4, CONTEXT])
def test_every_metric_against_numpy(stride: int | None) -> None:
    model = make_model()
    if stride is None:
        expected, windows = numpy_evaluation(model, CONTEXT + 1 - OVERLAP, False), None
    else:
        expected, windows = numpy_evaluation(model, stride, True), strided_windows(SPLIT, CONTEXT, stride)
    found = run(model, windows)
    nats = expected["loss"] * (sum(LENGTHS) - len(LENGTHS))

    by_frequency = asdict(found)["by_frequency"]
    metrics = asdict(found) | asdict(found.evaluation)
    close = {
        "loss": expected["loss"],
        "perplexity": math.exp(expected["loss"]),
        "bits_per_byte": nats / math.log(2) / 120,
        "byte_perplexity": math.exp(nats / 120),
        "word_perplexity": math.exp(nats / 23),
        "accuracy": expected["accuracy"],
        "accuracy_at_5": expected["accuracy_at_5"],
    }
    assert {name: metrics[name] for name in close} == pytest.approx(close, rel=2e-5)
    assert found.evaluation.num_tokens == expected["num_tokens"]
    assert 0 < found.accuracy < found.accuracy_at_5 < 1
    assert found.calibration.ece == pytest.approx(expected["ece"], rel=2e-5)
    by_document, by_position = expected["document"], expected["position"]
    assert found.by_document.losses == pytest.approx([by_document[i] for i in range(5)], rel=2e-5)
    assert found.by_position.losses == pytest.approx([by_position[i] for i in range(1, CONTEXT + 1)], rel=2e-5)
    assert by_frequency["names"][:2] == ["0", "1 to 9"]
    assert dict(enumerate(by_frequency["losses"])) == pytest.approx(expected["digits"], rel=2e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 32])
def test_the_light_evaluation_agrees_and_averages_over_batches(batch_size: int) -> None:
    model = make_model()
    light, detailed = run_light(model, batch_size), run(model, batch_size=batch_size).evaluation
    for name in ("loss", "perplexity", "mean_batch_loss", "mean_batch_perplexity", "bits_per_byte", "word_perplexity"):
        assert getattr(detailed, name) == pytest.approx(getattr(light, name), rel=1e-6)
    for name in ("num_tokens", "num_windows", "num_batches", "batch_size"):
        assert getattr(detailed, name) == getattr(light, name)
    losses = numpy_evaluation(model, CONTEXT + 1 - OVERLAP, False)["windows"]
    means = [np.mean(list(chain(*losses[i : i + batch_size]))) for i in range(0, len(losses), batch_size)]
    assert light.mean_batch_loss == pytest.approx(np.mean(means), rel=1e-5)
    assert light.mean_batch_perplexity == pytest.approx(np.mean(np.exp(means)), rel=1e-5)
    assert (light.num_batches, light.batch_size) == (len(means), batch_size)
    # Windows of 7 that share 2: 3 + 1 + 2 + 1 + 4, each overlap scored twice.
    assert (light.num_windows, light.num_tokens) == (11, 45 + (OVERLAP - 1) * (11 - 5))


@both
@pytest.mark.parametrize("level", [-200.0, -100.0, -95.0, -90.0, 90.0, 100.0, 200.0])
def test_logits_that_are_all_far_from_zero(run_either: Callable[[Transformer], Evaluation], level: float) -> None:
    model = make_model()
    with torch.no_grad():
        # By far the largest component of every residual, which the last norm makes sqrt(12).
        model.token_embedding.weight[:, 0] = 100.0
        model.get_parameter("final_norm.weight")[0] = level / 100.0 / math.sqrt(12)
    assert ((model.logits(torch.arange(CONTEXT)[None]) / level - 1).abs() < 0.1).all()
    expected = numpy_evaluation(model, CONTEXT + 1 - OVERLAP, False)["loss"]
    assert run_either(model).loss == pytest.approx(expected, abs=2e-5)


def test_groups_of_windows_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(make_model())
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 1)
    window_by_window = run(make_model())
    for found in (whole, window_by_window):
        assert found.normalized_share == 6 / 123
    assert window_by_window.evaluation.loss == pytest.approx(whole.evaluation.loss, rel=1e-6)
    for group in ("by_frequency", "by_position", "by_document"):
        expected = vars(getattr(whole, group))
        assert vars(getattr(window_by_window, group)) == {
            name: pytest.approx(values, rel=1e-5) if name != "names" else values for name, values in expected.items()
        }


def test_only_the_averages_over_batches_depend_on_the_batch_size() -> None:
    one, seven = run(make_model(), batch_size=1), run(make_model(), batch_size=7)
    assert one.evaluation.mean_batch_loss != seven.evaluation.mean_batch_loss
    batchwise = ("mean_batch_loss", "mean_batch_perplexity", "num_batches", "batch_size", "seconds")
    same = dict.fromkeys(batchwise, 0)
    assert replace(one.evaluation, **same) == replace(seven.evaluation, **same), "to the last bit"
    assert repr(replace(one, evaluation=None)) == repr(replace(seven, evaluation=None))  # pyright: ignore


@pytest.mark.parametrize("stride", range(1, CONTEXT + 1))
def test_strided_scores_each_token_once_in_order_with_enough_context(stride: int) -> None:
    windows, protocol = strided_windows(SPLIT, CONTEXT, stride)
    parts: list[Scores] = []
    score(make_model(), windows, protocol.once, {}, parts.append)
    expected = [t for d in np.split(SPLIT.ids, SPLIT.offsets[1:-1]) for t in d[1:].tolist()]
    assert np.concatenate([scores.tokens for scores in parts]).tolist() == expected
    places = list(chain(*(range(1, length) for length in LENGTHS)))
    positions = np.concatenate([scores.positions for scores in parts])
    for before, place in zip(positions.tolist(), places, strict=True):
        assert before >= min(place, CONTEXT - stride + 1)


@pytest.mark.parametrize("stride", [0, -1, CONTEXT + 1])
def test_a_stride_that_does_not_fit_is_refused(stride: int) -> None:
    with pytest.raises(LumiereError, match="1 to 6"):
        strided_windows(SPLIT, CONTEXT, stride)


def test_a_model_that_knows_nothing_is_the_uniform_baseline() -> None:
    model = make_model()
    torch.nn.init.zeros_(model.token_embedding.weight)
    found = run(model)
    assert found.evaluation.perplexity == pytest.approx(VOCAB, rel=1e-12)
    assert run_light(model).perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert found.accuracy == pytest.approx(1 / VOCAB, rel=1e-12), "all tokens share the first place"
    assert found.accuracy_at_5 == pytest.approx(5 / VOCAB, rel=1e-12)
    assert found.calibration.ece == pytest.approx(0, abs=1e-12)
    uniform = next(iter(found.baselines or ()))
    assert uniform.name == "uniform"
    assert uniform.bits_per_byte == pytest.approx(found.evaluation.bits_per_byte, rel=1e-12)


def test_tokens_that_are_as_likely_share_their_places() -> None:
    logits = torch.tensor([[3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    weight = torch.eye(7)
    for token, at_1, at_5 in [(0, 0.5, 1.0), (2, 0.0, 0.75), (6, 0.0, 0.0)]:
        found = score_logits(logits, weight, torch.tensor([token]))
        assert (found.at_1.item(), found.at_5.item()) == (at_1, at_5)


def test_baselines_are_scored_on_the_same_tokens_in_the_same_windows() -> None:
    found = run(make_model())
    fitted = fit_baselines(TRAIN.ids, TRAIN.offsets, VOCAB)
    baselines = list(found.baselines or ())
    assert [scored.name for scored in baselines] == list(fitted)
    for scored in baselines:
        losses = [fitted[scored.name].losses(window[None])[0] for window in training_windows_by_hand()]
        losses = np.concatenate(losses)
        assert len(losses) == found.evaluation.num_tokens
        assert scored.loss == pytest.approx(np.mean(losses), rel=1e-12)
        assert scored.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-12)


def test_a_rotary_model_scores_as_a_stock_llama() -> None:
    model = make_model(positions="rotary")
    llama, nats, count = stock_llama(model), 0.0, 0
    for window in training_windows_by_hand():
        ids = torch.tensor(window[None].astype(np.int64))
        with torch.no_grad():
            nats += llama(ids, labels=ids).loss.item() * (len(window) - 1)
        count += len(window) - 1
    found = run(model).evaluation
    assert found.num_tokens == count
    assert found.loss == pytest.approx(nats / count, rel=1e-5)


def test_calibration_by_hand() -> None:
    # Two tokens in the bin (1/15, 2/15], two in the last; its edge belongs to the bin below.
    confidences, is_right = np.array([0.1, 2 / 15, 1.0, 0.96]), np.array([0.0, 1.0, 1.0, 0.0])
    bins = GroupSums(15, 2)
    for part in (np.s_[:1], np.s_[1:]):
        bins.add(bins_of(confidences[part]), confidences[part], is_right[part])
    found = calibration(bins)
    assert [i for i, count in enumerate(found.counts) if count] == [1, 14]
    assert found.confidences[1] == pytest.approx((0.1 + 2 / 15) / 2)
    assert (found.accuracies[1], found.accuracies[14]) == (0.5, 0.5)
    assert found.ece == pytest.approx((abs(1 - 0.1 - 2 / 15) + abs(1 - 1.96)) / 4)


def normal_totals(seed: int, documents: int = 400, shift: float = 0.0) -> DocumentTotals:
    draw = np.random.default_rng(seed)
    ones = np.ones(documents)
    return DocumentTotals(100 * (3 + shift + draw.normal(0, 0.5, documents)), *[100 * ones] * 7)


def test_the_bootstrap_finds_the_error_of_a_mean() -> None:
    """Of documents of one length the mean loss is a mean of means: its standard error has a formula."""
    totals = normal_totals(0)
    errors = standard_errors(totals) or {}
    expected = np.std(totals.nats / 100, ddof=1) / math.sqrt(400)
    assert errors["loss"] == pytest.approx(expected, rel=0.08)  # 1,000 resamples leave some 2 %
    assert errors["accuracy"] == 0
    assert errors == standard_errors(totals), "seeded"
    assert standard_errors(DocumentTotals(*(column[:1] for column in totals))) is None


def test_a_paired_difference_is_surer_than_the_figures() -> None:
    base = normal_totals(0)
    other = base._replace(nats=base.nats + 1 + np.random.default_rng(1).normal(0, 0.1, 400))
    fields = attrgetter("difference", "standard_error", "low", "high", "num_documents", "num_lower")
    difference, error, low, high, num_documents, num_lower = fields(paired_difference(base, other, "loss"))
    errors = standard_errors(base) or {}
    assert difference == pytest.approx((other.nats - base.nats).mean() / 100)
    assert error == pytest.approx(np.std((other.nats - base.nats) / 100, ddof=1) / 20, rel=0.08)
    assert error < errors["loss"] / 100
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (num_documents, num_lower) == (400, 0)
    assert fields(paired_difference(base, base, "bits_per_byte"))[:4] == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="the same documents"):
        paired_difference(base, base._replace(num_bytes=base.num_bytes * 2), "loss")


@pytest.mark.parametrize("documents", [2, 6, 19])
def test_few_documents_have_the_interval_of_a_paired_t_test(documents: int) -> None:
    """Resamples of few documents vary too little: their quantiles would cover less than they say."""
    base = normal_totals(0, documents)
    found = paired_difference(base, base._replace(nats=normal_totals(1, documents).nats), "loss")
    each = (normal_totals(1, documents).nats - base.nats) / 100
    error = np.std(each, ddof=1) / math.sqrt(documents)
    quantile = {2: 12.706, 6: 2.571, 19: 2.101}[documents]
    assert found is not None
    assert (found.low + found.high) / 2 == pytest.approx(found.difference)
    assert found.high - found.low == pytest.approx(2 * quantile * error, rel=0.1)


@both
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_mode_and_random_state_are_restored(
    run_either: Callable[[Transformer], Evaluation], training: bool
) -> None:
    model = make_model()
    expected = run_either(model).loss
    model.train(training)
    state = torch.get_rng_state()
    assert run_either(model).loss == expected
    assert model.training is training
    # A resumed run must draw the same dropout whether or not it was evaluated.
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@both
def test_the_mode_is_restored_after_an_error(
    run_either: Callable[[Transformer], Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tokens: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    model = make_model().train()
    monkeypatch.setattr(model, "final_residual", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_either(model)
    assert model.training


def test_a_confidently_wrong_model_has_an_infinite_perplexity() -> None:
    model = make_model()
    model.token_embedding.weight.data *= 1e6
    found, light = run(model), run_light(model)
    assert found.evaluation.perplexity == found.evaluation.mean_batch_perplexity == math.inf
    assert light.perplexity == light.word_perplexity == light.mean_batch_perplexity == math.inf
    assert math.isfinite(found.evaluation.bits_per_byte)
    assert math.isfinite(light.bits_per_byte)
    assert json.dumps(found.by_document.losses)
