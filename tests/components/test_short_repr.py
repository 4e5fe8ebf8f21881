"""The `repr` of what holds tensors is short, whatever their sizes."""

from dataclasses import dataclass

import numpy as np
import torch

from lumiere.components.short_repr import ShortRepr
from lumiere.data.dataset import TokenizedCorpus
from lumiere.interpret.head_scores import score_heads
from lumiere.interpret.logit_attribution import logit_attribution
from lumiere.interpret.logit_lens import logit_lens
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import Run
from tests.models.build import make_model


@dataclass(frozen=True)
class Held(ShortRepr):
    name: str
    count: int
    tensor: torch.Tensor
    arrays: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class More(Held):
    rate: float


def test_shapes_in_place_of_values() -> None:
    arrays = (np.zeros((2, 3)), np.zeros(0))
    assert repr(Held("a", 1, torch.zeros(4, 5), arrays)) == (
        "Held(name='a', count=1, tensor=Tensor[4, 5], arrays=(ndarray[2, 3], ndarray[0]))"
    )
    assert repr(More("a", 1, torch.tensor(0.5), (), 0.25)) == (
        "More(name='a', count=1, tensor=tensor(0.5000), arrays=(), rate=0.25)"
    )


def test_outputs_results_checkpoints_and_splits_are_short(trained_run: Run, tiny_corpus: TokenizedCorpus) -> None:
    model = make_model(num_layers=12, context_size=64)
    tokens = [3 + i % 10 for i in range(64)]
    output = model(torch.tensor([tokens]))
    assert "logits=Tensor[1, 64, 13]" in repr(output)
    assert "tensor(" not in repr(output)
    values = [output, logit_lens(model, tokens), logit_attribution(model, tokens)]
    values += [score_heads(model, torch.tensor([tokens])), tiny_corpus.splits["train"]]
    for value in (*values, CheckpointManager(trained_run.path.parent).load(trained_run, "best")):
        assert repr(value).startswith(f"{type(value).__name__}(")
        assert len(repr(value)) < 1500
