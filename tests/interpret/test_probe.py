"""Probes of properties that are planted, absent or decided by the token alone; and their controls by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lumiere.components.hooks import run_with_cache
from lumiere.errors import LumiereError
from lumiere.interpret.probe import (
    TEST,
    TRAIN,
    Examples,
    Labelled,
    auc_of,
    control_labels,
    probe,
    split_documents,
    token_accuracy,
)
from lumiere.interpret.result import agreement
from lumiere.models.transformer import Transformer
from tests.interpret.models import random_model
from tests.models.build import VARIANTS

NUM_TEXTS = 60


def texts(seed: int = 0) -> list[list[int]]:
    """Texts of 8 to 12 tokens, each of 20 types."""
    random = np.random.default_rng(seed)
    return [[0, *random.integers(3, 23, size=random.integers(7, 12)).tolist()] for _ in range(NUM_TEXTS)]


def labelled(labels: list[list[int]], classes: tuple[str, ...] = ("no", "yes")) -> Labelled:
    return Labelled(texts(), labels, texts(), range(NUM_TEXTS), classes)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(scale=8).double()


def test_a_planted_direction_is_found_at_its_stage(model: Transformer) -> None:
    torch.manual_seed(5)
    planted_E = torch.randn(12, dtype=torch.float64)
    labels = []
    for row in texts():
        with torch.no_grad():
            _, cache = run_with_cache(model, torch.tensor([row]), ["blocks.1.hook_resid_post"])
        values_T = cache["blocks.1.hook_resid_post"][0] @ planted_E
        labels.append([-1, *(values_T[1:] > 0).long().tolist()])
    result = probe(model, labelled(labels), layers=[0, 1])
    assert result.holds
    assert result.stages == ("embedding", "L0", "L1")
    assert result.chosen == 2
    assert result.accuracy[2] > 0.97
    assert result.auc[2] > 0.995
    assert result.accuracy[0] < 0.9
    assert result.gain_low[2] > 0 == result.gain[0]
    assert result.test_sums.sum(2) / result.test_counts.sum(1)[:, None] == pytest.approx(
        np.stack([result.accuracy, result.selectivity])
    )
    assert result.test_counts.shape == (2, result.num_documents[TEST])
    assert result.accuracy_low[2] <= result.accuracy[2] <= result.accuracy_high[2]
    cosine = result.vector @ planted_E.numpy() / np.linalg.norm(result.vector) / float(planted_E.norm())
    assert cosine > 0.95
    assert result.sparse[-1] > result.sparse[0]


def test_random_labels_cannot_be_read(model: Transformer) -> None:
    random = np.random.default_rng(1)
    result = probe(model, labelled([[-1, *(random.random(len(row) - 1) < 0.2).astype(int)] for row in texts()]))
    assert result.majority == pytest.approx(0.8, abs=0.1)
    assert result.accuracy == pytest.approx(result.majority, abs=0.03)
    assert result.balanced_accuracy == pytest.approx(0.5, abs=0.06)
    assert result.auc_low[result.chosen] < 0.5 < result.auc_high[result.chosen]


def test_a_property_of_the_type_is_no_more_than_a_control_task() -> None:
    """Both are decided by the embedding, and the label of each type in training gives all of it."""
    model = random_model(scale=8, positions="rotary", embedding_size=24)
    result = probe(model, labelled([[-1, *(token % 2 for token in row[1:])] for row in texts()]), layers=[0])
    assert result.accuracy[0] == 1
    assert result.by_token == 1
    assert result.control[0] == pytest.approx(1, abs=0.05)
    assert result.selectivity[0] == pytest.approx(0, abs=0.05)


def test_several_classes_and_equal_weights(model: Transformer) -> None:
    labels = [[-1, *(min(token % 7, 2) for token in row[1:])] for row in texts()]
    plain = probe(model, labelled(labels, classes=("a", "b", "c")), layers=[0])
    even = probe(model, labelled(labels, classes=("a", "b", "c")), layers=[0], is_balanced=True)
    assert plain.holds
    assert even.holds
    assert np.isnan(plain.auc).all()
    assert even.balanced_accuracy[0] >= plain.balanced_accuracy[0]
    assert plain.counts.sum() == sum(len(row) - 1 for row in texts())
    assert plain.num_documents.tolist() == [36, 12, 12]


def test_documents_are_never_split() -> None:
    documents = np.repeat(np.arange(20) * 3, 5)
    part = split_documents(documents, 0)
    assert [len(set(documents[part == number])) for number in range(3)] == [12, 4, 4]
    assert sum(len(set(part[documents == document])) for document in set(documents)) == 20
    assert not np.array_equal(part, split_documents(documents, 1))
    with pytest.raises(LumiereError, match="5 documents"):
        split_documents(np.arange(4), 0)


def test_texts_that_occur_twice_count_once(model: Transformer) -> None:
    labels = [[-1, *(token % 2 for token in row[1:])] for row in texts()]
    once = probe(model, labelled(labels), layers=[0])
    doubled = Labelled(texts() * 2, labels * 2, texts() * 2, [*range(NUM_TEXTS)] * 2, ("no", "yes"))
    assert probe(model, doubled, layers=[0]).counts.tolist() == once.counts.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_all_building_blocks_are_probed(variant: dict[str, Any]) -> None:
    """In both precisions: losses agree, fits are at their optimum."""
    model = random_model(scale=8, **({"num_layers": 2, "d_key": 8} | variant))
    data = labelled([[-1, *(int(token > 12) for token in row[:-1])] for row in texts()])
    found, exact = probe(model, data), probe(model.double(), data)
    assert found.holds
    assert exact.holds
    assert agreement(found, exact).holds
    assert exact.accuracy.shape == (3,)


def test_a_class_without_tokens_is_named(model: Transformer) -> None:
    with pytest.raises(LumiereError, match="'yes'"):
        probe(model, labelled([[0] * len(row) for row in texts()]))
    with pytest.raises(LumiereError, match="no token"):
        probe(model, labelled([[-1] * len(row) for row in texts()]))


def test_the_area_under_the_curve_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    scores, is_positive = random.integers(0, 9, 50).astype(float), random.random(50) < 0.4  # with ties
    weights = random.integers(0, 4, (3, 50)).astype(float)
    expected = [roc_auc_score(is_positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(auc_of(scores, is_positive, weights), expected)


def test_control_labels_and_the_majority_of_each_type_by_hand() -> None:
    y = np.array([0, 0, 1, 1, 1, 0, 1, 0])
    kind = np.array([5, 5, 5, 7, 7, 5, 7, 9])
    split = np.array([TRAIN] * 5 + [TEST] * 3)
    found = Examples(torch.zeros(1, 8, 2), y, kind, kind, np.arange(8), split)
    train, test = split == TRAIN, split == TEST
    # 5 is mostly 0, 7 is 1, 9 is unseen: the majority, 1, which is wrong.
    assert token_accuracy(found, train, test, 1) == pytest.approx(2 / 3)
    seen = set()
    for seed in range(20):
        drawn = control_labels(found, train, 2, seed).numpy()
        assert all(len(set(drawn[kind == name])) == 1 for name in (5, 7, 9))
        seen.add(tuple(drawn))
    assert len(seen) > 3
