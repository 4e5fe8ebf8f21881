"""A training on the fast path ends where one in plain torch operations does."""

import pytest
import torch
import torch.nn.functional as F

from lumiere.components.kernels import IGNORED
from lumiere.models.transformer import Transformer
from lumiere.training import trainer


def plain_loss(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model.logits(tokens).flatten(0, 1)
    return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_after_300_steps_the_validation_losses_are_the_same(
    configure, launch, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    # At ten times this learning rate the training is chaotic: the last bit of a product decides about tenths of a nat.
    changes = {"model.dropout": 0.0, "training.max_steps": 300, "dataset.num_documents": 40}
    changes |= {"training.learning_rate": 1e-3}
    config = configure(changes | {"training.precision": precision})
    fast = launch(config).evaluation.loss
    with monkeypatch.context() as patch:
        patch.setattr("lumiere.components.kernels.prefers_hand_written", lambda x: False)
        patch.setattr(trainer, "summed_loss", plain_loss)
        plain = launch(configure(changes | {"training.precision": "float32"})).evaluation.loss
    assert plain < 4.5, "it has learnt something: 5.77 would be a guess"
    assert fast == pytest.approx(plain, abs=0.01)
