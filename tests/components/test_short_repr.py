"""The `repr` of what holds tensors is short, whatever their sizes."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lumiere.components.short_repr import ShortRepr
from lumiere.config.loader import validate
from lumiere.data.dataset import TokenizedCorpus
from lumiere.interpret.head_scores import score_heads
from lumiere.interpret.logit_attribution import logit_attribution
from lumiere.interpret.logit_lens import logit_lens
from lumiere.models.transformer import build_model
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run


@dataclass(frozen=True)
class Held(ShortRepr):
    name: str
    count: int
    tensor: torch.Tensor
    arrays: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class More(Held):
    share: float


def test_shapes_in_the_place_of_values() -> None:
    arrays = (np.zeros((2, 3)), np.zeros(0))
    assert repr(Held("a", 1, torch.zeros(4, 5), arrays)) == (
        "Held(name='a', count=1, tensor=Tensor[4, 5], arrays=(ndarray[2, 3], ndarray[0]))"
    )
    assert repr(More("a", 1, torch.tensor(0.5), (), 0.25)) == (
        "More(name='a', count=1, tensor=tensor(0.5000), arrays=(), share=0.25)"
    )


@pytest.mark.parametrize("length", [2, 64])
def test_outputs_and_results_are_short(length: int) -> None:
    model = build_model(validate({"model": {"context_size": 64, "num_layers": 12}, "tokenizer": {"vocab_size": 320}}))
    tokens = list(range(3, 3 + length))
    output = model.eval()(torch.tensor([tokens]))
    assert f"logits=Tensor[1, {length}, 320]" in repr(output)
    results = [logit_lens(model, tokens), logit_attribution(model, tokens), score_heads(model, torch.tensor([tokens]))]
    for value in (output, *results):
        assert repr(value).startswith(f"{type(value).__name__}(")
        assert len(repr(value)) < 1500
    assert "tensor(" not in repr(output)


def test_checkpoints_and_splits_are_short(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    checkpoint = CheckpointManager(trained_run.path.parent).load(trained_run, "best")
    for value in (checkpoint, tiny_corpus.splits["train"]):
        assert len(repr(value)) < 1500
