"""Losses, surprisals, entropies and ranks against numpy, an evaluation, and counts by hand."""

import numpy as np
import pytest
import torch

from lumiere.evaluation.ngrams import BigramModel
from lumiere.interpret.token_losses import token_losses
from lumiere.models.transformer import Transformer
from tests.interpret.models import TOKENS, random_model, untrained_model


def test_numbers_are_those_of_the_probabilities(model: Transformer) -> None:
    """In numpy, from the model's logits in float64."""
    result = token_losses(model, TOKENS)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, :-1].double().numpy()
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    rows, targets = np.arange(9), np.array(TOKENS[1:])
    entropies = -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(1)
    order = np.argsort(-probabilities, axis=1)
    for values, expected in (
        (result.losses, -np.log(probabilities[rows, targets])),
        (result.surprisals, -np.log2(probabilities[rows, targets])),
        (result.entropies, entropies),
        (result.probabilities, probabilities.max(1)),
    ):
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    assert result.ranks.tolist() == [order[row].tolist().index(target) for row, target in enumerate(targets)]
    assert result.predictions.tolist() == order[:, 0].tolist()
    table = list(result.rows())
    assert [(row["position"], row["token"]) for row in table] == list(enumerate(TOKENS))[1:]
    assert [row["loss"] for row in table] == result.losses.tolist()
    with pytest.raises(ValueError, match="one token"):
        token_losses(model, [0])


def test_tied_tokens_share_their_places() -> None:
    """A model that knows nothing: each of 320 tokens is first 1 time in 320, and the loss is ln 320."""
    blank = untrained_model()
    blank.token_embedding.weight.data.zero_()
    result = token_losses(blank, TOKENS)
    assert (result.ranks == 0).all()
    assert (result.ties == 320).all()
    np.testing.assert_allclose(result.on_top, 1 / 320)
    np.testing.assert_allclose(result.places, sum(range(320)) / 320)
    np.testing.assert_allclose([result.losses, result.entropies], np.log(320), rtol=1e-6)


def test_baselines_are_counts(trained: Transformer) -> None:
    """Documents 0 5 6 and 0 5 5: of four tokens to predict three are 5, and after 0 there was always 5."""
    bigram = BigramModel.fit(np.array([0, 5, 6, 0, 5, 5]), np.array([0, 3, 6]), vocab_size=320)
    result = token_losses(trained, [0, 5, 6], bigram.unigram, bigram)
    unigram = np.array([4, 2]) / 324
    assert result.unigram_losses is not None
    assert result.bigram_losses is not None
    assert {"unigram_loss", "bigram_loss"} < set(next(result.rows()))
    np.testing.assert_allclose(result.unigram_losses, -np.log(unigram))
    # c(0 5) = 2 of 2, one kind; c(5 6) = 1 of 2, two kinds.
    np.testing.assert_allclose(
        result.bigram_losses, -np.log([(2 + unigram[0]) / (2 + 1), (1 + 2 * unigram[1]) / (2 + 2)])
    )


def test_receipts_show_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
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
