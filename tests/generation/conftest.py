"""Models and decoders to generate with."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere.data.dataset import TokenizedCorpus
from lumiere.data.tokenizer import Tokenizer
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run

CONTEXT_SIZE = 16
VOCAB_SIZE = 40


class Script:
    """A decoder that predicts the tokens of a script, one per call, and records the rows it was given.

    Args:
        change: Called with the logits and the rows before they are returned.
    """

    def __init__(
        self, script: Sequence[int], vocab_size: int, change: Callable[[Tensor, list[list[int]]], object] | None = None
    ) -> None:
        self.script = iter(script)
        self.vocab_size = vocab_size
        self.change = change
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
        if self.change is not None:
            self.change(logits_BV, self.shown)
        return logits_BV


@pytest.fixture(scope="module")
def tokenizer(tiny_corpus: TokenizedCorpus) -> Tokenizer:
    return tiny_corpus.tokenizer


@pytest.fixture
def model(trained_run: Run) -> Transformer:
    return trained_run.load_model()


def random_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    """Large random weights, gains too, so that every part matters; queries and values of different widths."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "d_key": 8, "d_value": 7, "d_ff": 24}
    model = Transformer(VOCAB_SIZE, 32, CONTEXT_SIZE, **(sizes | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if parameter.ndim == 1:
            parameter.data += 1
    return model.to(dtype).eval()
