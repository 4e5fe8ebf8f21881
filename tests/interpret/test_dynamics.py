"""Numbers along a training: those of each analysis alone, at every snapshot, each loaded once."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lumiere.data.batches import make_batch
from lumiere.data.dataset import TokenizedCorpus
from lumiere.evaluation.loss import evaluate
from lumiere.interpret.dynamics import METRICS, Dynamics, Texts, follow, worse
from lumiere.interpret.head_scores import SCORES, composition_scores, repeated_tokens, score_heads
from lumiere.interpret.logit_lens import logit_lens
from lumiere.interpret.result import Receipt
from lumiere.interpret.summary import matrix_facts
from lumiere.models.transformer import Transformer
from lumiere.persistence.checkpoint_manager import snapshot_steps
from lumiere.persistence.runs import Run
from tests.interpret.circuits import INDUCTION, PREVIOUS, induction_circuit
from tests.interpret.models import SIZES, text_windows, untrained_model

ALL = tuple(METRICS)


def loader(run: Run) -> Callable[[int], Transformer]:
    return lambda step: run.load_model(str(step))


@pytest.fixture(scope="module")
def texts(trained_run: Run, tiny_corpus: TokenizedCorpus) -> Texts:
    config = trained_run.load_config()
    windows = tiny_corpus.windows("validation", config)
    tokens, lengths = windows.cut(np.arange(len(windows)))
    full = torch.from_numpy(tokens[lengths == tokens.shape[1]])
    return Texts(
        tokens=repeated_tokens(300, 7, 8, seed=0, start=0, first=3),
        windows=text_windows(full[:8], np.arange(8)),
        batches=[make_batch(windows, part) for part in (np.arange(5), np.arange(5, len(windows)))],
        lens_rows=full[:2, :-1].tolist(),
    )


@pytest.fixture(scope="module")
def result(trained_run: Run, texts: Texts) -> Dynamics:
    return follow(snapshot_steps(trained_run), loader(trained_run), ALL, texts)


def value(result: Dynamics, metric: str, place: str, column: int) -> float:
    found = [row for row in range(len(result.metrics)) if (result.metrics[row], result.places[row]) == (metric, place)]
    assert len(found) == 1
    return float(result.values[found[0], column])


@pytest.mark.parametrize("column", [0, 4])
def test_each_number_is_that_of_the_analysis_alone(
    column: int, trained_run: Run, tiny_corpus: TokenizedCorpus, texts: Texts, result: Dynamics
) -> None:
    model = trained_run.load_model(str(result.steps[column]))
    assert texts.windows is not None
    heads = score_heads(model, texts.tokens, texts.windows)
    for layer, head in np.ndindex(2, 2):
        for number, name in enumerate(SCORES):
            assert value(result, name, f"L{layer}H{head}", column) == heads.scores[layer, head, number]
        assert value(result, "copying", f"L{layer}H{head}", column) == heads.copying[layer, head]
    assert value(result, "repeat-gap", "", column) == heads.repeat_gap
    assert value(result, "in-context-score", "", column) == heads.in_context_score
    composition = composition_scores(model)
    for pair, scores in zip(composition.pairs.tolist(), composition.scores, strict=True):
        place = "L{}H{}>L{}H{}".format(*pair)
        for kind, score in zip("qkv", scores, strict=True):
            assert value(result, f"{kind}-composition", place, column) == pytest.approx(score * 4)  # sqrt(16)
    facts = matrix_facts(model)
    query, embedding = map(facts["matrices"].index, ("blocks.1.attention.query.weight", "token_embedding.weight"))
    assert value(result, "norm", "1.attention.query", column) == facts["norms"][query]
    assert value(result, "effective-rank", "token_embedding", column) == facts["effective_ranks"][embedding]
    depths = [logit_lens(model, row).decision_stages for row in texts.lens_rows]
    assert value(result, "lens-depth", "", column) == pytest.approx(np.mean(depths))
    windows = tiny_corpus.windows("validation", trained_run.load_config())
    whole = evaluate(model, windows, tiny_corpus.splits["validation"].facts, batch_size=7)
    assert value(result, "validation-loss", "", column) == pytest.approx(whole.loss, rel=1e-6)


def test_step_0_is_near_the_baselines(result: Dynamics) -> None:
    for row, metric in enumerate(result.metrics):
        baseline, first = result.baselines[row], result.values[row, 0]
        if metric in SCORES:
            assert first == pytest.approx(baseline, abs=0.02)
        elif metric in ("repeat-gap", "in-context-score", "validation-loss"):
            assert first == pytest.approx(baseline, abs=0.1)
        elif metric.endswith("composition"):
            assert first == pytest.approx(1, abs=0.5)  # heads of width 8 in a stream of 16
    assert result.steps.tolist() == [0, 1, 2, 4, 8]
    assert result.holds
    laws = {receipt.check for receipt in result.receipts if "step 0" in receipt.check}
    assert len(laws) == 3


def test_a_model_that_is_not_untrained_at_step_0_is_told(texts: Texts, trained_run: Run) -> None:
    circuit = induction_circuit()
    tokens = repeated_tokens(21, 15, 4, seed=0, start=0, first=3)
    found = follow([0, 1], lambda step: circuit, ["induction", "repeat-gap"], Texts(tokens))
    assert not found.holds
    broken = {receipt.check for receipt in found.receipts if not receipt.holds}
    assert broken >= {"at step 0 heads look at all tokens alike", "at step 0 there is no repeat gap"}


def test_each_snapshot_is_loaded_once_and_the_last_again(trained_run: Run, texts: Texts) -> None:
    loaded, told = [], []

    def load(step: int) -> Transformer:
        loaded.append(step)
        return trained_run.load_model(str(step))

    follow([0, 4, 8], load, ALL, texts, emit=told.append)
    assert loaded == [0, 4, 8, 8]
    assert told == [1, 2, 3]


def test_a_snapshot_that_differs_when_it_is_loaded_again_is_told(texts: Texts, trained_run: Run) -> None:
    """The receipt of the last snapshot has teeth: here the second time another one comes."""
    steps = iter((0, 8, 4))
    found = follow([0, 8], lambda step: trained_run.load_model(str(next(steps))), ["induction"], texts)
    assert [receipt.check for receipt in found.receipts if not receipt.holds] == [
        "the last snapshot, loaded and analysed alone"
    ]


def test_the_birth_of_a_circuit_is_marked() -> None:
    """An untrained model up to step 256, from 512 on the circuit built by hand."""
    torch.manual_seed(0)
    circuit = induction_circuit()
    untrained = Transformer(24, circuit.embedding_size, 33, 2, 4, circuit.d_key, 24, 1).eval()
    steps = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    tokens = repeated_tokens(21, 15, 8, seed=0, start=0, first=3)
    metrics = ["previous", "induction", "repeat-gap"]
    found = follow(steps, lambda step: circuit if step >= 512 else untrained, metrics, Texts(tokens))
    assert found.holds
    for metric, place in (("previous", PREVIOUS), ("induction", INDUCTION)):
        best = found.series_of(metric)[0]
        assert found.places[best] == "L{}H{}".format(*place)
        assert (found.phase_starts[best], found.phase_ends[best]) == (256, 512)
        assert found.phase_sizes[best] == pytest.approx(1 - found.baselines[best], abs=0.05)
    gap = found.series_of("repeat-gap")[0]
    assert (found.phase_starts[gap], found.phase_ends[gap]) == (256, 512)
    constant = [row for row in range(len(found.metrics)) if found.phase_starts[row] < 0]
    assert np.isnan(found.phase_sizes[constant]).all()
    in_phase = {row["step"] for row in found.rows() if row["metric"] == "repeat-gap" and row["in_phase_change"]}
    assert in_phase == {256, 512}


def test_matrices_of_zeros_have_no_level_to_rise_from() -> None:
    """With `zero_output_init` four matrices are zero at step 0 and not from step 1 on: that is no phase change."""
    sizes = {**SIZES, "num_layers": 2}
    zero, trained = (untrained_model(**sizes, zero_output_init=is_zero) for is_zero in (True, False))
    metrics = ["norm", "spectral-norm", "effective-rank", "stable-rank"]
    tokens = torch.zeros(1, 3, dtype=torch.long)
    found = follow([0, 1, 2, 4, 8], lambda step: trained if step else zero, metrics, Texts(tokens))
    assert (found.values[:, 0] == 0).sum() == 4 * 4
    assert (found.phase_starts == -1).all()
    assert found.num_tried == len(found.metrics)
    short = follow([0, 1, 2, 4], lambda step: trained if step else zero, metrics, Texts(tokens))
    assert short.num_tried == len(short.metrics) - 16, "three values are too few"


def test_rows_and_curve(trained_run: Run, texts: Texts) -> None:
    found = follow([0, 8], loader(trained_run), ["previous"], texts, curve=[(2, 5.0), (4, 4.5)])
    rows = list(found.rows())
    assert len(rows) == 4 * 2
    assert rows[1] == {
        "metric": "previous",
        "place": "L0H0",
        "step": 8,
        "in_phase_change": False,
        "value": float(found.values[0, 1]),
    }
    assert found.curve_steps.tolist() == [2, 4]
    assert found.curve_losses.tolist() == [5.0, 4.5]


def test_the_worse_receipt_of_a_law() -> None:
    small, large, broken = (Receipt("a", error, 1.0) for error in (0.1, 0.2, float("nan")))
    assert worse(small, None) is small
    assert worse(small, large) is large
    assert worse(large, small) is large
    assert worse(broken, large) is broken
    assert not worse(broken, large).holds
