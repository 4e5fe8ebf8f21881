"""The repetition penalty and the ban on n-grams against the classes of `transformers`."""

from typing import Any

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from lumiere.generation.sampling import Repetition, Sampling

CPU = torch.device("cpu")


@pytest.mark.parametrize("penalty", [None, 1.3, 0.7])
@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_both_are_those_of_transformers(penalty: float | None, size: int | None) -> None:
    """Few ids, so that all repeats; rows that grow, one of which falls away and one of which comes twice."""
    sampling = Sampling(repetition_penalty=penalty, no_repeat_ngram_size=size)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 9, (3, 2), generator=generator).tolist()
    repetition = Repetition(rows, sampling, 12, CPU)
    for step in range(25):
        logits_BV = 2 * torch.randn(3, 12, generator=generator)
        logits_BV[:, 11] = -torch.inf
        expected: Any = logits_BV
        if penalty is not None:
            expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(rows), expected)  # type: ignore[arg-type]
        if size is not None:
            expected = NoRepeatNGramLogitsProcessor(size)(torch.tensor(rows), expected)  # type: ignore[arg-type]
        assert torch.equal(repetition.applied(logits_BV), expected)
        if step == 10:
            repetition.keep([2, 0, 2])
            rows = [list(rows[2]), list(rows[0]), list(rows[2])]
        tokens = torch.randint(0, 9, (3,), generator=generator).tolist()
        repetition.append(tokens)
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)


def test_by_hand() -> None:
    repetition = Repetition([[1, 2, 1]], Sampling(repetition_penalty=2, no_repeat_ngram_size=2), 4, CPU)
    # 1 and 2 were there: a positive logit is halved, a negative one doubled; after 1 came 2, which may not come again.
    assert repetition.applied(torch.tensor([[3.0, 3.0, -1.0, -1.0]])).tolist() == [[3.0, 1.5, -torch.inf, -1.0]]
    repetition.append([3])
    assert repetition.applied(torch.tensor([[3.0, 3.0, -1.0, -1.0]])).tolist() == [[3.0, 1.5, -2.0, -2.0]]
