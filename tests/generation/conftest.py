"""Models and decoders to write with."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lumiere.data.dataset import TokenizedCorpus
from lumiere.data.tokenizer import Tokenizer
from lumiere.models.transformer import Transformer

CONTEXT_SIZE = 16
VOCAB_SIZE = 40


class Script:
    """Stands in for a decoder: predicts the tokens of a script, one a call, and keeps what it was shown."""

    def __init__(self, script: Sequence[int], vocab_size: int) -> None:
        self.script = iter(script)
        self.vocab_size = vocab_size
        self.shown: list[list[int]] = []

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self.shown = [list(row) for row in rows]
        return self._logits()

    def step(self, tokens: Sequence[int]) -> Tensor:
        for row, token in zip(self.shown, tokens, strict=True):
            row.append(token)
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self.shown = [list(self.shown[row]) for row in rows]

    def _logits(self) -> Tensor:
        logits_BV = torch.zeros(len(self.shown), self.vocab_size)
        logits_BV[:, next(self.script)] = 10.0
        return logits_BV


@pytest.fixture(scope="module")
def tokenizer(tiny_corpus: TokenizedCorpus) -> Tokenizer:
    return tiny_corpus.tokenizer


def random_model(positions: str, dtype: torch.dtype = torch.float32, d_value: int = 7, layers: int = 2) -> Transformer:
    """Large random weights, gains too, so that every part matters; queries and values are of different widths."""
    torch.manual_seed(1)
    model = Transformer(VOCAB_SIZE, 32, CONTEXT_SIZE, layers, 4, 8, d_value, 24, positions=positions)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if parameter.ndim == 1:
            parameter.data += 1
    return model.to(dtype).eval()
