"""Evaluation against the same figures computed in plain Python from a transformer in numpy."""

import math
from itertools import chain

import numpy as np
import pytest
import torch

from lumiere.config.loader import validate
from lumiere.data.batches import Windows
from lumiere.data.dataset import SplitFacts
from lumiere.evaluation.loss import evaluate, exponential
from lumiere.models.transformer import Transformer, build_model
from tests import reference

CONTEXT, OVERLAP, VOCAB = 6, 2, 259
LENGTHS = [15, 4, 8, 2, 21]
"""Tokens of the documents; windows of 7 that share 2 give 3 + 1 + 2 + 1 + 4."""
FACTS = SplitFacts(5, num_tokens=sum(LENGTHS), num_bytes=123, num_words=23, sha256="", num_normalized_bytes=120)


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [[0, *draw.integers(3, VOCAB, length - 2).tolist(), 1] for length in LENGTHS]


@pytest.fixture(scope="module")
def windows(documents: list[list[int]]) -> Windows:
    ids = np.array(list(chain(*documents)), dtype=np.uint16)
    return Windows(ids, np.cumsum([0, *LENGTHS]), CONTEXT, OVERLAP)


@pytest.fixture
def model() -> Transformer:
    """With dropout, which an evaluation must not use."""
    sizes = {"embedding_size": 12, "context_size": CONTEXT, "num_layers": 2, "num_heads": 2, "d_key": 5, "d_value": 7}
    torch.manual_seed(2)
    config = validate(
        {
            "model": {**sizes, "d_ff": 9, "dropout": 0.5},
            "tokenizer": {"vocab_size": VOCAB},
            "dataset": {"sliding_window_size": OVERLAP},
        }
    )
    model = build_model(config)
    model.token_embedding.weight.data *= 30
    return model.eval()


def window_losses(model: Transformer, documents: list[list[int]]) -> list[list[float]]:
    """The negative log-likelihood of each predicted token of each window, in numpy and float64."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    losses = []
    for document in documents:
        starts = range(0, max(1, len(document) - OVERLAP), CONTEXT + 1 - OVERLAP)
        for window in (document[start : start + CONTEXT + 1] for start in starts):
            logits, _, _ = reference.transformer(weights, window[:-1], num_heads=2)
            losses.append(
                [math.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, window[1:], strict=True)]
            )
    return losses


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_figures_by_hand(model: Transformer, documents: list[list[int]], windows: Windows, batch_size: int) -> None:
    losses = window_losses(model, documents)
    assert len(losses) == len(windows) == 3 + 1 + 2 + 1 + 4
    every = list(chain(*losses))
    batches = [list(chain(*losses[i : i + batch_size])) for i in range(0, len(losses), batch_size)]
    means = [sum(batch) / len(batch) for batch in batches]
    loss = sum(every) / len(every)
    # Each of the 50 tokens once, without the first of each of the 5 documents.
    nats = loss * (50 - 5)

    result = evaluate(model, windows, FACTS, batch_size)

    def close(expected: float) -> object:
        return pytest.approx(expected, rel=1e-5)

    assert result.loss == close(loss)
    assert result.perplexity == close(math.exp(loss))
    assert result.mean_batch_loss == close(sum(means) / len(means))
    assert result.mean_batch_perplexity == close(sum(map(math.exp, means)) / len(means))
    assert result.bits_per_byte == close(nats / math.log(2) / 120)
    assert result.word_perplexity == close(math.exp(nats / 23))
    assert (result.num_tokens, result.num_windows) == (len(every), 11)
    assert (result.num_batches, result.batch_size) == (len(batches), batch_size)
    # Tokens in an overlap are scored in both windows: 2 a window beyond a document's first, less none.
    assert result.num_tokens == 45 + (OVERLAP - 1) * (11 - 5)


def test_only_the_averages_over_batches_depend_on_the_batch_size(model: Transformer, windows: Windows) -> None:
    one, seven, all_at_once = (evaluate(model, windows, FACTS, size) for size in (1, 7, 32))
    for other in (seven, all_at_once):
        for name in ("loss", "perplexity", "bits_per_byte", "word_perplexity"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6)
        assert other.num_tokens == one.num_tokens
    assert len({round(result.mean_batch_loss, 4) for result in (one, seven, all_at_once)}) == 3
    # One batch has one mean; of several, Jensen's inequality holds.
    assert all_at_once.mean_batch_loss == pytest.approx(all_at_once.loss, rel=1e-6)
    assert all_at_once.mean_batch_perplexity == pytest.approx(all_at_once.perplexity, rel=1e-6)
    assert one.mean_batch_perplexity > math.exp(one.mean_batch_loss)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model: Transformer, windows: Windows) -> None:
    torch.nn.init.zeros_(model.token_embedding.weight)
    result = evaluate(model, windows, FACTS, 4)
    assert result.loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert result.mean_batch_perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(VOCAB) * 45 / 120, rel=1e-6)
    assert result.word_perplexity == pytest.approx(VOCAB ** (45 / 23), rel=1e-5)


@pytest.mark.parametrize("level", [-200.0, -100.0, -95.0, -90.0, 90.0, 100.0, 200.0])
def test_logits_that_are_all_far_from_zero(
    model: Transformer, documents: list[list[int]], windows: Windows, level: float
) -> None:
    with torch.no_grad():
        # By far the largest component of every residual, which the last norm makes sqrt(12).
        model.token_embedding.weight[:, 0] = 100.0
        model.final_norm.weight[0] = level / 100.0 / math.sqrt(12)
    logits = model.logits(torch.arange(CONTEXT)[None])
    assert ((logits / level - 1).abs() < 0.1).all()
    losses = list(chain(*window_losses(model, documents)))
    assert evaluate(model, windows, FACTS, batch_size=4).loss == pytest.approx(sum(losses) / len(losses), abs=2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(model: Transformer, windows: Windows, training: bool) -> None:
    expected = evaluate(model.eval(), windows, FACTS, 4).loss
    model.train(training)
    state = torch.get_rng_state()
    assert evaluate(model, windows, FACTS, 4).loss == expected
    assert model.training is training
    # A resumed run must draw the same dropout whether or not it was evaluated.
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_comes_back_after_an_error(
    model: Transformer, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tokens: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    model.train()
    monkeypatch.setattr(model, "final_residual", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(model, windows, FACTS, 4)
    assert model.training


def test_a_model_that_is_surely_wrong_has_an_infinite_perplexity(model: Transformer, windows: Windows) -> None:
    model.token_embedding.weight.data *= 1e6
    result = evaluate(model, windows, FACTS, 4)
    assert result.loss > 1000
    assert result.perplexity == result.word_perplexity == result.mean_batch_perplexity == math.inf
    assert math.isfinite(result.bits_per_byte)
    assert exponential(1.0) == math.e
