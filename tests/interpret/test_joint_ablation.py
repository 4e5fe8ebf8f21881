"""Ablations of several parts: against a model without their outputs, and on heads that stand in for each other."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumiere.components.kernels import IGNORED
from lumiere.data.batches import Batch
from lumiere.errors import LumiereError
from lumiere.interpret.ablation import ablate
from lumiere.interpret.joint_ablation import Part, ablate_together, parse_parts
from lumiere.models.transformer import Transformer
from tests.interpret.circuits import PREVIOUS, of_head, repeated_tokens
from tests.interpret.models import BATCHES, exact, random_model

MODEL = exact(random_model())


def mean_loss(model: Transformer) -> float:
    total = 0.0
    for batch in BATCHES:
        with torch.no_grad():
            logits = model(batch.tokens).logits.flatten(0, 1)
        total += F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum").item()
    return total / sum(batch.num_targets for batch in BATCHES)


def test_parts_without_their_output_matrices() -> None:
    """Zero ablation of heads, a neuron and a feed-forward part is a model whose output weights of them are zero."""
    sets: list[list[Part]] = [
        [("head", 0, 1), ("head", 2, 0)],
        [("head", 1, 1), ("neuron", 0, 4), ("feedforward", 2, 0)],
    ]
    found = ablate_together(MODEL, BATCHES, sets, "zero")
    assert found.sets == ("L0H1+L2H0", "L1H1+L0N4+L2F")
    for number, parts in enumerate(sets):
        changed = deepcopy(MODEL)
        for kind, layer, index in parts:
            block = changed.blocks[layer]
            if kind == "head":
                block.attention.output.weight.data[:, index * MODEL.d_value : (index + 1) * MODEL.d_value] = 0
            else:
                assert block.feedforward is not None
                block.feedforward.down.weight.data[:, slice(None) if kind == "feedforward" else index] = 0
        assert found.joint[number] == pytest.approx(mean_loss(changed) - mean_loss(MODEL), abs=1e-10)
    assert found.holds
    assert found.receipts[0].tolerance == 1e-10


@pytest.mark.parametrize("mode", ["mean", "zero", "resample"])
def test_single_parts_are_those_of_ablate(mode: str) -> None:
    found, expected = (
        ablate_together(MODEL, BATCHES, parse_parts("pairs", MODEL), mode),
        ablate(MODEL, BATCHES, "head", mode),
    )
    assert found.parts == expected.labels
    if mode != "resample":  # which draws other donors
        np.testing.assert_allclose(found.changes, expected.changes, atol=1e-10)
        np.testing.assert_allclose(found.standard_errors, expected.standard_errors, atol=1e-10)
    assert len(found.sets) == 15
    singles = dict(zip(found.parts, found.changes, strict=True))
    sums = [sum(singles[part] for part in name.split("+")) for name in found.sets]
    np.testing.assert_allclose(found.interactions, found.joint - sums, atol=1e-12)


def test_heads_that_stand_in_for_each_other_show_together(circuit: Transformer) -> None:
    """A second previous-token head in layer 0: without one of them the circuit works, without both it does not."""
    model = deepcopy(circuit)
    attention, backup = model.blocks[0].attention, 3
    for part in (attention.query, attention.key, attention.value):
        of_head(part.weight.data, backup).copy_(of_head(part.weight.data, PREVIOUS[1]))
    columns = attention.output.weight.data.view(model.embedding_size, 4, -1)
    columns[:, backup] = columns[:, PREVIOUS[1]]
    tokens = torch.tensor([repeated_tokens(8, seed=seed) for seed in range(4)])
    targets = tokens[:, 1:].clone()
    targets[:, :8] = IGNORED
    batch = Batch(tokens[:, :-1].contiguous(), targets, int((targets != IGNORED).sum()))
    found = ablate_together(model, [batch], parse_parts("L0H0+L0H3,L0H0+L0H1", model), "zero")
    redundant, independent = found.interactions
    assert redundant > 1
    assert abs(independent) < 0.05 * redundant
    assert found.joint[0] > 10 * found.changes.max()


@pytest.mark.parametrize("text", ["", "L0H0", "L0H0+L0H0", "L0H0+L9H0", "L0H0+L0H9", "L0H0+head", "L0N0+L0N9", "all"])
def test_what_are_no_parts_is_refused(text: str) -> None:
    with pytest.raises(LumiereError) as refused:
        parse_parts(text, MODEL)
    assert refused.value.hint


def test_resample_needs_two_sequences() -> None:
    one = Batch(BATCHES[0].tokens[:1], BATCHES[0].targets[:1], 5)
    with pytest.raises(LumiereError):
        ablate_together(MODEL, [one], parse_parts("L0H0+L0H1", MODEL), "resample")
