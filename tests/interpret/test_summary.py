"""The summary of models that are well, and of models that are broken on purpose."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lumiere.config.loader import validate
from lumiere.data.batches import Batch
from lumiere.data.dataset import TokenizedCorpus
from lumiere.interpret.summary import PLACES_KEPT, Check, ModelSummary, check, summarize
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.runs import Run


def random_model(positions: str = "learned") -> Transformer:
    sizes = {"embedding_size": 12, "context_size": 16, "num_layers": 2, "num_heads": 2, "d_key": 6, "d_value": 7}
    torch.manual_seed(1)
    settings = {"model": {**sizes, "d_ff": 9, "positions": positions}, "tokenizer": {"vocab_size": 320}}
    return build_model(validate(settings)).eval()


def text() -> Batch:
    tokens = torch.randint(3, 320, (4, 16), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens, tokens.numel())


def summary(model: Transformer, token_counts: np.ndarray | None = None) -> ModelSummary:
    return summarize(model, [text()], token_counts)


def found(result: ModelSummary) -> dict[str, tuple[str, ...]]:
    return {warning.what: warning.places for warning in result.warnings}


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_fresh_model_is_well(positions: str) -> None:
    result = summary(random_model(positions), np.ones(320))
    assert found(result) == {}
    assert result.holds
    assert len(result.receipts) == 4
    assert (result.position_norms is None) == (positions == "rotary")
    assert len(result.checks) == (10 if positions == "learned" else 9)


def test_a_trained_model(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    counts = np.bincount(tiny_corpus.splits["train"].ids, minlength=320)
    result = summary(trained_run.load_model("best").eval(), counts)
    assert result.holds
    assert len(found(result)["tokens that were never met in training"]) == (counts == 0).sum() > 0


def broken_attention(model: Transformer) -> None:
    model.blocks[1].attention.output.weight.data.zero_()


def broken_feedforward(model: Transformer) -> None:
    model.blocks[0].feedforward.down.weight.data *= 1e-6


def broken_head(model: Transformer) -> None:
    model.blocks[0].attention.value.weight.data[7:] = 0


def broken_neuron(model: Transformer) -> None:
    model.blocks[1].feedforward.up.weight.data[4] = 0


def broken_gain(model: Transformer) -> None:
    model.blocks[1].attention_norm.weight.data[3] = -0.001


def broken_rank(model: Transformer) -> None:
    model.blocks[0].attention.key.weight.data[:] = torch.outer(torch.randn(12), torch.randn(12)) * 0.01


def broken_token(model: Transformer) -> None:
    model.token_embedding.weight.data[17] = 0


def broken_pair(model: Transformer) -> None:
    model.token_embedding.weight.data[99] = model.token_embedding.weight.data[41] * 2


def broken_position(model: Transformer) -> None:
    assert model.position_embedding is not None
    model.position_embedding.weight.data[9] = model.position_embedding.weight.data[8]


@pytest.mark.parametrize(
    ("break_it", "what", "places"),
    [
        (broken_feedforward, "parts of layers that do nothing", ("L0 feed-forward",)),
        (broken_head, "heads that do nothing", ("L0H1",)),
        (broken_neuron, "dead neurons", ("L1N4",)),
        (broken_gain, "gains that shut a direction out", ("blocks.1.attention_norm.3",)),
        (broken_rank, "matrices of low rank", ("blocks.0.attention.key.weight",)),
        (broken_token, "tokens without a vector", ("17",)),
        (broken_pair, "tokens with the vector of an earlier token", ("99, 41",)),
        (broken_position, "positions with the vector of an earlier one", ("9, 8",)),
    ],
)
def test_what_is_broken_is_found_and_nothing_else(
    break_it: Callable[[Transformer], None], what: str, places: tuple[str, ...]
) -> None:
    model = random_model()
    break_it(model)
    result = summary(model)
    assert found(result) == {what: places}
    assert result.holds


def test_attention_that_writes_nothing_has_heads_that_write_nothing() -> None:
    model = random_model()
    broken_attention(model)
    assert found(summary(model)) == {
        "matrices of low rank": ("blocks.1.attention.output.weight",),
        "parts of layers that do nothing": ("L1 attention",),
        "heads that do nothing": ("L1H0", "L1H1"),
    }


def test_weights_that_are_not_finite_are_named_and_fail() -> None:
    model = random_model()
    model.blocks[1].feedforward.gate.weight.data[0, 0] = math.nan
    result = summary(model)
    assert found(result)["weights that are no finite numbers"] == ("blocks.1.feedforward.gate.weight",)
    assert not result.holds


def test_tokens_that_were_never_met() -> None:
    counts = np.ones(320)
    counts[[5, 300]] = 0
    assert found(summary(random_model(), counts)) == {"tokens that were never met in training": ("5", "300")}


def test_without_a_text_the_weights_have_to_do() -> None:
    with_text, without = summary(random_model()), summarize(random_model())
    assert (without.num_windows, without.writes, without.largest_activations) == (0, None, None)
    assert len(without.receipts) == 3
    assert [c.what for c in without.checks] == [c.what for c in with_text.checks][:-3]
    assert list(without.rows()) == list(with_text.rows())


def test_embeddings() -> None:
    model = random_model()
    assert model.position_embedding is not None
    tokens, positions = model.token_embedding.weight.data, model.position_embedding.weight.data
    result = summary(model)
    np.testing.assert_allclose(result.token_norms, tokens.norm(dim=1), rtol=1e-5)
    share = tokens.mean(0).square().sum() / tokens.square().sum(1).mean()
    assert result.token_mean_share == pytest.approx(float(share), rel=1e-4)
    cosines = torch.cosine_similarity(positions[1:], positions[:-1])
    assert result.position_cosine == pytest.approx(float(cosines.mean()), abs=1e-5)
    moved = copy.deepcopy(model)
    moved.token_embedding.weight.data[:] = moved.token_embedding.weight.data[0]
    assert summary(moved).token_mean_share == pytest.approx(1, rel=1e-5)


def test_rows_are_the_matrices() -> None:
    result = summary(random_model())
    rows = list(result.rows())
    assert [row["matrix"] for row in rows] == list(result.matrices)
    row = rows[3]
    assert (row["rows"], row["columns"]) == tuple(result.shapes[3])
    assert row["effective_rank"] == result.effective_ranks[3]
    assert row["spectral_norm"] <= row["norm"]
    assert row["rms"] == pytest.approx(row["norm"] / math.sqrt(row["rows"] * row["columns"]))


def test_many_places_are_counted_and_some_named() -> None:
    many = check("tokens", "any", [str(number) for number in range(PLACES_KEPT + 5)])
    assert (many.count, len(many.places)) == (PLACES_KEPT + 5, PLACES_KEPT)
    assert check("tokens", "any", []) == Check("tokens", "any", 0, ())


def test_the_model_is_left_as_it_was() -> None:
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summary(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
