"""`training.loss_positions: last`, against documents read one by one and torch's own cross-entropy."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lumiere.components.kernels import IGNORED
from lumiere.config.schema import RunConfig
from lumiere.data.batches import Windows, batch_at, batches_in_order, make_batch
from lumiere.data.dataset import TokenizedSplit, document_sizes, source_parts, tokenize_corpus
from lumiere.errors import DataError
from lumiere.evaluation.detailed import evaluate_in_detail
from lumiere.evaluation.loss import evaluate
from lumiere.evaluation.scoring import training_windows
from lumiere.models.transformer import Transformer, build_model
from lumiere.training.state import TrainingState
from tests.cli.commands import read_json, refuse
from tests.training.short import CPU, short, take_step, train

CONTEXT = 6
SUMS = [f"{a} + {b} = {(a + b) % 7}" for a in range(7) for b in range(7)]


@pytest.fixture
def config() -> RunConfig:
    """Sums modulo 7, and one text that is longer than a window."""
    for name, texts in {"train": [*SUMS[:30], "1 + 1 + 1 + 1 + 1 = 5"], "valid": SUMS[30:]}.items():
        Path(f"{name}.json").write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    return short(
        {
            "model.dropout": 0.0,
            "model.context_size": 8,
            "dataset.name": "json",
            "dataset.num_documents": None,
            "dataset.data_files": {"train": "train.json", "validation": "valid.json"},
            "dataset.sliding_window_size": 2,
        },
        loss_positions="last",
        max_steps=None,
        max_epochs=2,
    )


def documents_of(split: TokenizedSplit) -> list[list[int]]:
    return [split.ids[a:b].tolist() for a, b in zip(split.offsets, split.offsets[1:], strict=False)]


def answer_losses(model: Transformer, documents: list[list[int]]) -> torch.Tensor:
    """The loss of the token before the end token, given the tokens before it, one document at a time, in float64."""
    losses = []
    for document in documents:
        *before, answer, _ = document
        logits = model(torch.tensor([before[-model.context_size :]])).logits[0, -1].double()
        losses.append(cross_entropy(logits, torch.tensor(answer)))
    return torch.stack(losses)


@given(st.lists(st.lists(st.integers(3, 99), max_size=15), min_size=1, max_size=6), st.sampled_from([1, 2, 2**20]))
def test_each_window_ends_with_the_last_token_of_a_text(texts: list[list[int]], at_once: int) -> None:
    documents = [[0, *text, 1] for text in texts]
    ids, offsets = np.concatenate(documents), np.cumsum([0, *map(len, documents)])
    windows = Windows(ids, offsets, CONTEXT, 2, only_last=True)
    expected = [[0, *text][-(CONTEXT + 1) :] for text in texts if text]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumiere.data.batches.DOCUMENTS_AT_ONCE", at_once)
        assert len(windows) == len(expected)
        if not expected:
            return
        inputs = sum(len(window) - 1 for window in expected)
        assert windows.padding_share == pytest.approx(1 - inputs / (len(expected) * CONTEXT))
    batch = make_batch(windows, np.arange(len(expected)))
    assert batch.num_targets == len(expected)
    for row, targets, window in zip(batch.tokens.tolist(), batch.targets.tolist(), expected, strict=True):
        given, answer = window[:-1], window[-1]
        assert row[: len(given)] == given
        assert targets == [IGNORED] * (len(given) - 1) + [answer] + [IGNORED] * (CONTEXT - len(given))
    assert batch.documents is not None
    assert batch.documents.tolist() == [number for number, text in enumerate(texts) if text]
    # Three ranks divide a step and an evaluation, and count the targets of all of them.
    whole = batch_at(0, windows, 4, seed=1)
    shares = [batch_at(0, windows, 4, 1, rank, 3) for rank in range(3)]
    assert {share.num_targets for share in shares} == {whole.num_targets} == {min(4, len(expected))}
    found = [share.targets[share.targets != IGNORED] for share in shares]
    assert torch.equal(torch.cat(found), whole.targets[whole.targets != IGNORED])
    counts = [batch.num_targets for rank in range(3) for batch in batches_in_order(windows, 2, rank, 3)]
    assert sum(counts) == len(expected)


def test_training_counts_and_scores_one_token_per_document(config: RunConfig) -> None:
    corpus = tokenize_corpus(config)
    trained = train(config)
    num_documents = corpus.splits["train"].facts.num_documents
    assert [event.tokens for event in trained.evaluations] == [num_documents, 2 * num_documents]
    model, (*_, last) = trained.run.load_model("latest"), trained.evaluations
    losses = answer_losses(model, documents_of(corpus.splits["validation"]))
    assert last.evaluation.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert last.evaluation.num_tokens == len(losses) == len(SUMS) - 30
    facts = corpus.splits["validation"].facts
    bits = losses.sum().item() / math.log(2) / facts.num_normalized_bytes
    assert last.evaluation.bits_per_byte == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_takes_the_mean_over_the_answers(config: RunConfig, parts: int) -> None:
    corpus = tokenize_corpus(config)
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"gradient_accumulation_steps": parts})}
    )
    state = TrainingState.create(config, CPU)
    documents = documents_of(corpus.splits["train"])
    batch = batch_at(0, corpus.windows("train", config), len(documents), seed=0)
    mean = answer_losses(state.model, documents).mean()
    gradients = torch.autograd.grad(mean, list(state.model.parameters()))
    state.optimizers.step = lambda factor: None
    loss, norm = take_step(state, batch, config)
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    assert norm == pytest.approx(torch.cat([gradient.flatten() for gradient in gradients]).norm().item(), rel=1e-4)


def test_a_detailed_evaluation_scores_the_same_tokens(config: RunConfig) -> None:
    corpus = tokenize_corpus(config)
    split, model = corpus.splits["validation"], build_model(config).eval()
    documents, are_decoded = source_parts(config.dataset, corpus, "validation")
    sizes = document_sizes(documents, split, corpus.tokenizer, are_decoded)
    windows, protocol = training_windows(split, 8, 2, only_last=True)
    found = evaluate_in_detail(model, split, sizes, windows, protocol, 5)
    losses = answer_losses(model, documents_of(split))
    assert found.by_document.losses == pytest.approx(losses.tolist(), rel=1e-5)
    expected = evaluate(model, windows, split.facts, 5)
    for name in ("loss", "bits_per_byte", "word_perplexity", "mean_batch_loss", "num_tokens"):
        assert getattr(found.evaluation, name) == pytest.approx(getattr(expected, name), rel=1e-5), name


def test_eval_scores_the_answers_of_such_a_run(config: RunConfig) -> None:
    trained, other = train(config), train(short({}, max_steps=1))
    scored = read_json("eval", trained.run.id, "--no-baselines")
    assert (scored["protocol"], scored["num_tokens"]) == ("last", len(SUMS) - 30)
    assert scored["loss"] == pytest.approx(trained.evaluations[-1].evaluation.loss, rel=1e-6)
    assert read_json("eval", trained.run.id, "--no-baselines", "--stride", "4")["num_tokens"] > len(SUMS) - 30
    Path("text.txt").write_text("one and two", encoding="utf-8")
    error, hint = refuse("eval", trained.run.id, other.run.id, "--text", "text.txt", after_notes=True)
    assert "training.loss_positions" in error
    assert "--stride" in hint


def test_texts_without_an_answer_are_refused(config: RunConfig) -> None:
    split = tokenize_corpus(config).splits["train"]
    with pytest.raises(DataError):
        replace(split, ids=np.array([0, 1]), offsets=np.array([0, 2])).windows(4, 0, only_last=True)
