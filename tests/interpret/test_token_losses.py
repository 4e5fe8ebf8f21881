"""Losses, surprisals, entropies and ranks against numpy, an evaluation, and counts by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumiere.config.loader import validate
from lumiere.data.dataset import tokenize_text
from lumiere.data.tokenizer import Tokenizer
from lumiere.evaluation.loss import evaluate
from lumiere.evaluation.ngrams import BigramModel
from lumiere.interpret.token_losses import TokenLosses, token_losses
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.runs import Run

TOKENS = [0, 70, 71, 72, 70, 71, 9, 300, 4, 1]


@pytest.fixture(scope="module")
def model() -> Transformer:
    sizes = {"embedding_size": 12, "context_size": 16, "num_layers": 2, "num_heads": 2, "d_key": 5, "d_value": 7}
    torch.manual_seed(1)
    config = validate({"model": {**sizes, "d_ff": 9, "dropout": 0.5}, "tokenizer": {"vocab_size": 320}})
    model = build_model(config).eval()
    for parameter in model.parameters():
        parameter.data *= 12 if parameter.ndim == 2 else 1
    return model


def probabilities_of(model: Transformer, tokens: list[int]) -> np.ndarray:
    """(T-1, Vocab), from the watching path, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double().numpy()
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def check(result: TokenLosses, probabilities: np.ndarray) -> None:
    rows, targets = np.arange(len(probabilities)), np.array(result.tokens[1:])
    of_target = probabilities[rows, targets]
    np.testing.assert_allclose(result.losses, -np.log(of_target), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.surprisals, -np.log2(of_target), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        result.entropies, -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(1), rtol=1e-4, atol=1e-5
    )
    order = np.argsort(-probabilities, axis=1)
    assert result.ranks.tolist() == [order[row].tolist().index(target) for row, target in enumerate(targets)]
    assert result.predictions.tolist() == order[:, 0].tolist()
    np.testing.assert_allclose(result.probabilities, probabilities.max(1), rtol=1e-4)
    assert result.holds


def test_numbers_are_those_of_the_probabilities(model: Transformer) -> None:
    result = token_losses(model, TOKENS)
    check(result, probabilities_of(model, TOKENS))
    assert np.ptp(result.losses) > 2  # not all alike
    assert result.tokens == tuple(TOKENS)


def test_numbers_of_a_trained_model(trained_run: Run) -> None:
    trained = trained_run.load_model("best")
    check(token_losses(trained, TOKENS), probabilities_of(trained, TOKENS))


@given(st.lists(st.integers(3, 319), min_size=2, max_size=16))
def test_laws(model: Transformer, tokens: list[int]) -> None:
    result = token_losses(model, tokens)
    assert result.holds
    assert (result.entropies >= 0).all()
    assert ((result.ranks == 0) == (result.predictions == np.array(tokens[1:]))).all()
    assert (np.exp(-result.losses) <= result.probabilities * (1 + 1e-4)).all()


def test_the_mean_is_the_loss_of_an_evaluation(trained_run: Run) -> None:
    trained, tokenizer = trained_run.load_model("best"), Tokenizer.load(trained_run.path / "tokenizer.json")
    split = tokenize_text("Once upon", tokenizer)
    assert len(split.ids) <= 16
    evaluation = evaluate(trained, split.windows(16, 0), split.facts, batch_size=1)
    assert token_losses(trained, split.ids.tolist()).losses.mean() == pytest.approx(evaluation.loss, rel=1e-5)


def test_a_later_token_changes_no_earlier_prediction(model: Transformer) -> None:
    changed = [*TOKENS[:-1], 200]
    before, after = token_losses(model, TOKENS), token_losses(model, changed)
    for name in ("losses", "entropies", "probabilities"):
        np.testing.assert_allclose(getattr(before, name)[:-1], getattr(after, name)[:-1], rtol=1e-5)
    assert before.losses[-1] != after.losses[-1]


def test_tied_tokens_share_their_places() -> None:
    """A model that knows nothing: each of 320 tokens is first 1 time in 320, and the loss is ln 320."""
    blank = build_model(validate({"model": {"context_size": 16}, "tokenizer": {"vocab_size": 320}})).eval()
    blank.token_embedding.weight.data.zero_()
    result = token_losses(blank, TOKENS)
    assert (result.ranks == 0).all()
    assert (result.ties == 320).all()
    np.testing.assert_allclose(result.on_top, 1 / 320)
    np.testing.assert_allclose(result.places, sum(range(320)) / 320)
    np.testing.assert_allclose([result.losses, result.entropies], np.log(320), rtol=1e-6)


def test_baselines_are_counts(model: Transformer) -> None:
    """Documents 0 5 6 and 0 5 5: of four tokens to predict three are 5, and after 0 there was always 5."""
    bigram = BigramModel.fit(np.array([0, 5, 6, 0, 5, 5]), np.array([0, 3, 6]), vocab_size=320)
    result = token_losses(model, [0, 5, 6], bigram.unigram, bigram)
    unigram = np.array([4, 2]) / 324
    assert result.unigram_losses is not None
    assert result.bigram_losses is not None
    np.testing.assert_allclose(result.unigram_losses, -np.log(unigram))
    # c(0 5) = 2 of 2, one kind; c(5 6) = 1 of 2, two kinds.
    np.testing.assert_allclose(
        result.bigram_losses, -np.log([(2 + unigram[0]) / (2 + 1), (1 + 2 * unigram[1]) / (2 + 2)])
    )


def test_rows_are_a_table(model: Transformer) -> None:
    bigram = BigramModel.fit(np.array([0, 5, 6]), np.array([0, 3]), vocab_size=320)
    without, with_baselines = token_losses(model, TOKENS), token_losses(model, TOKENS, bigram.unigram, bigram)
    columns = ["position", "token", "loss", "surprisal", "entropy", "rank", "ties"]
    columns += ["prediction", "probability"]
    rows = list(without.rows())
    assert [list(row) for row in rows] == [columns] * 9
    assert [(row["position"], row["token"]) for row in rows] == list(enumerate(TOKENS))[1:]
    assert [row["loss"] for row in rows] == without.losses.tolist()
    assert list(next(with_baselines.rows())) == [*columns, "unigram_loss", "bigram_loss"]


def test_receipts_show_what_is_wrong(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    right = model.logits
    monkeypatch.setattr(model, "logits", lambda tokens: right(tokens) * 1.1)
    sums, evaluated, entropies = token_losses(model, TOKENS).receipts
    assert sums.holds
    assert not evaluated.holds
    assert entropies.holds
    monkeypatch.undo()
    softmax = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda logits, axis: softmax(logits * 0, axis) + 0.1)
    sums, _, entropies = token_losses(model, TOKENS).receipts
    assert not sums.holds
    assert not entropies.holds


def test_one_token_is_a_wrong_call(model: Transformer) -> None:
    with pytest.raises(ValueError, match="one token"):
        token_losses(model, [0])
