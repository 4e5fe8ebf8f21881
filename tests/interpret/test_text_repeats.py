"""Names that come again in real text: which pairs count, scores and gaps by hand, and the laws of known models."""

import numpy as np
import pytest
import torch

from lumiere.config.loader import validate
from lumiere.data.tokenizer import PAD
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret.head_scores import SCORES, HeadScores, add_text_repeats, first_occurrences, head_scores
from lumiere.models.transformer import Transformer, build_model
from tests.interpret.circuits import INDUCTION, PREVIOUS, induction_circuit

SIZES = {"embedding_size": 12, "context_size": 12, "num_layers": 2, "num_heads": 3, "d_key": 4, "d_value": 5, "d_ff": 9}


def random_model(**changes: object) -> Transformer:
    torch.manual_seed(3)
    model = build_model(validate({"model": {**SIZES, **changes}, "tokenizer": {"vocab_size": 300}})).eval()
    for parameter in model.parameters():
        parameter.data *= 15 if parameter.ndim == 2 else 1
    return model.double()


def scored(model: Transformer, windows: torch.Tensor, documents: np.ndarray) -> HeadScores:
    return add_text_repeats(head_scores(model, torch.tensor([[0, 5, 6]])), model, windows, documents)


def names(num_windows: int, width: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """(N, T) windows of random tokens in which a name of three tokens comes twice."""
    draw = np.random.default_rng(seed)
    windows = draw.integers(3, vocab_size, (num_windows, width))
    for row in windows:
        first = draw.integers(1, width // 2 - 3)
        second = draw.integers(width // 2, width - 3)
        row[second : second + 3] = row[first : first + 3]
    return torch.from_numpy(windows)


def by_hand(windows: torch.Tensor, documents: np.ndarray) -> dict[tuple[int, int], int]:
    """By window and position where the pair that starts there first occurred in the window."""
    pairs = [[tuple(row[i : i + 2]) for i in range(len(row) - 1)] for row in windows.tolist()]
    count = len(set(documents.tolist()))
    found = {}
    for number, row in enumerate(pairs):
        for position, pair in enumerate(row):
            others = {int(documents[other]) for other, words in enumerate(pairs) if pair in words}
            is_rare = len(others) <= max(1, count // 50)
            if min(pair) >= 3 and is_rare and row.index(pair) < position:
                found[number, position] = row.index(pair)
    return found


def test_a_natural_repeat_is_a_rare_pair_that_came_before_in_the_window() -> None:
    windows = torch.tensor(
        [
            [0, 7, 8, 9, 7, 8, 7, 8, 1],  # 7 8 at 4 and at 6, first at 1
            [5, 6, 3, 5, 6, 4, 4, 4, 1],  # 5 6 at 3, but another document has it too; 4 4 at 6
            [5, 6, 0, 1, 0, 1, PAD, PAD, PAD],  # special tokens do not count
            [9, 3, 7, 8, 3, 3, 3, 5, 1],  # 7 8 came before in its document, not in this window; 3 3 at 5
        ]
    )
    documents = np.array([2, 5, 8, 2])
    found = first_occurrences(windows, documents)
    expected = torch.full((4, 8), -1)
    expected[0, 4], expected[0, 6], expected[1, 6], expected[3, 5] = 1, 1, 5, 4
    assert torch.equal(found, expected)


def test_a_pair_that_one_in_fifty_documents_has_is_rare() -> None:
    windows = torch.arange(3, 303).view(100, 3)[:, [0, 1, 2, 0, 1]].clone()
    for common in (2, 3):
        windows[:common] = windows[0]
        assert ((first_occurrences(windows, np.arange(100)) >= 0).sum(1) == 1).sum() == (100 if common == 2 else 97)


def test_scores_and_gap_by_hand() -> None:
    model, windows, documents = random_model(), names(9, 13, 40), np.array([0, 0, 1, 1, 1, 2, 3, 3, 4])
    windows[4, 11:] = PAD
    result, firsts = scored(model, windows, documents), by_hand(windows, documents)
    assert len(firsts) >= 12
    assert result.text_repeats == len(firsts)
    assert result.text_documents == len({documents[n] for n, _ in firsts})
    with torch.no_grad():
        output = model(windows[:, :-1])
        losses = -output.logits.log_softmax(-1)
    number, sums, uniform = SCORES.index("induction"), np.zeros((2, 3)), []
    differences = np.zeros((3, len(windows)))
    for (n, t), first in firsts.items():
        sources = [s + 1 for s in range(t - 1) if windows[n, s] == windows[n, t]]
        sums += output.attention_weights[n, :, :, t, sources].sum(-1).numpy()
        uniform.append(len(sources) / (t + 1))
        target = windows[n, t + 1]
        differences[0, n] += losses[n, first, target] - losses[n, t, target]
        differences[1, n] += 1
    assert result.text_scores is not None
    assert result.text_uniform is not None
    np.testing.assert_allclose(result.text_scores[..., number], sums / np.count_nonzero(uniform), rtol=1e-6)
    assert result.text_uniform[number] == pytest.approx(np.sum(uniform) / np.count_nonzero(uniform))
    means, errors = clustered_means(differences[:1], differences[1], documents)
    assert (result.text_gap, result.text_gap_error) == pytest.approx((means[0], errors[0]))
    assert result.holds


def test_a_model_of_the_current_token_alone_has_no_gap() -> None:
    """Without attention, and with positions that only attention sees, both places of a pair are predicted alike."""
    model = random_model(positions="rotary")
    for block in model.blocks:
        block.attention.output.weight.data.zero_()
    result = scored(model, names(9, 13, 40), np.arange(9))
    assert float(result.text_gap or 0) == pytest.approx(0, abs=1e-12)
    assert float(result.text_gap_error or 0) == pytest.approx(0, abs=1e-12)


def test_the_circuit_built_by_hand_copies_names() -> None:
    """Its induction head looks at what came after the name's tokens, and no other head does."""
    circuit = induction_circuit()
    windows = torch.tensor([[0, *range(3, 19), *range(5, 21)], [0, *range(8, 24), *range(6, 22)]])
    result = scored(circuit, windows, np.array([0, 1]))
    assert result.text_scores is not None
    number = SCORES.index("induction")
    assert result.text_scores[(*(place for place in INDUCTION), number)] == pytest.approx(1, abs=1e-4)
    assert result.text_scores[(*PREVIOUS, number)] == pytest.approx(0, abs=1e-4)
    assert float(result.text_gap or 0) > np.log(24)


def test_text_without_repeats_has_no_scores() -> None:
    result = scored(random_model(), torch.arange(3, 29).view(2, 13), np.array([0, 1]))
    assert (result.text_repeats, result.text_documents) == (0, 0)
    assert result.text_scores is not None
    assert np.isnan(result.text_scores).all()
    assert np.isnan(result.text_gap or 0)


def test_of_many_windows_some_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows, documents = random_model(), names(10, 13, 40), np.arange(10)
    monkeypatch.setattr("lumiere.interpret.head_scores.MOST_TEXT_TOKENS", 5 * 13)
    assert scored(model, windows, documents).text_repeats == len(by_hand(windows[::2], documents[::2]))
