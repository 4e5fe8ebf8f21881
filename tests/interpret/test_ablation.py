"""Ablations: many at once against hooks one by one, on a circuit that is known, and their errors."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.components.hooks import hooked, run_with_cache
from lumiere.components.kernels import IGNORED
from lumiere.data.batches import Batch
from lumiere.data.tokenizer import PAD
from lumiere.errors import LumiereError
from lumiere.evaluation.scoring import clustered_means
from lumiere.interpret import ablation
from lumiere.interpret.ablation import MODES, UNITS, Unit, ablate, draw_donors
from lumiere.models.transformer import Transformer
from tests.interpret.circuits import INDUCTION, PREVIOUS, repeated_tokens
from tests.interpret.models import BATCHES, batch_of, exact, one_row, random_model

MODEL = exact(random_model())


def mean_loss(model: Transformer, batch: Batch) -> float:
    logits = model(batch.tokens).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED).item()


HOOKS = {"head": "attn.hook_z", "neuron": "mlp.hook_post", "feedforward": "hook_mlp_out", "position": "hook_resid_pre"}
PLACES = {"head": np.s_[:, :, 0], "neuron": np.s_[:, :, 0], "position": np.s_[:, 0]}
"""Where unit 0 is in its activation."""


def put(unit: str, activation: Tensor, replacement: Tensor, index: int) -> Tensor:
    """The activation with unit `index` replaced by that of `replacement`, of the same shape."""
    place = (*PLACES[unit][:-1], index) if unit in PLACES else ...
    changed = activation.clone()
    changed[place] = replacement[place]
    return changed


def replacements(model: Transformer, unit: str, layer: int, mode: str, donors: list[Tensor]) -> list[Tensor]:
    """What comes in place of the activation, for each batch; for a layer, of what it adds."""
    caches = [run_with_cache(model, batch.tokens)[1] for batch in BATCHES]
    if unit == "layer":
        old = [cache[f"blocks.{layer}.hook_resid_post"] - cache[f"blocks.{layer}.hook_resid_pre"] for cache in caches]
    else:
        old = [cache[f"blocks.{layer}.{HOOKS[unit]}"] for cache in caches]
    if mode == "zero":
        return [torch.zeros_like(activation) for activation in old]
    if mode == "mean":
        rows = torch.cat([activation[batch.tokens != PAD] for activation, batch in zip(old, BATCHES, strict=True)])
        return [rows.mean(0).expand_as(activation) for activation in old]
    return [
        torch.stack([torch.stack([a[d[b, t], t] for t in range(a.shape[1])]) for b in range(len(a))])
        for a, d in zip(old, donors, strict=True)
    ]


def hooks_of(unit: str, layer: int, index: int, new: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    if unit != "layer":
        return {f"blocks.{layer}.{HOOKS[unit]}": lambda activation: put(unit, activation, new, index)}
    # What the layer adds comes whole from its first part, and nothing from its second.
    return {f"blocks.{layer}.hook_attn_out": lambda _: new, f"blocks.{layer}.hook_mlp_out": torch.zeros_like}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("unit", UNITS)
@torch.no_grad()
def test_many_at_once_are_what_hooks_do_one_by_one(exact_model: Transformer, unit: str, mode: str) -> None:
    result = ablate(exact_model, BATCHES, unit, mode, seed=3)
    generator = torch.Generator().manual_seed(3)
    donors = [draw_donors(batch.tokens != PAD, generator) for batch in BATCHES]
    clean = np.array([mean_loss(exact_model, batch) for batch in BATCHES])
    np.testing.assert_allclose(result.batch_losses, clean, rtol=1e-10)
    expected, last = np.full_like(result.batch_changes, np.nan), max(result.indices)
    for layer in range(exact_model.num_layers):
        new = replacements(exact_model, unit, layer, mode, donors)
        for row in np.flatnonzero((result.layers == layer) & np.isin(result.indices, [0, 1, last])):
            for number, batch in enumerate(BATCHES):
                with hooked(exact_model, hooks_of(unit, layer, int(result.indices[row]), new[number])):
                    expected[row, number] = mean_loss(exact_model, batch) - clean[number]
    chosen = np.isfinite(expected[:, 0])
    np.testing.assert_allclose(result.batch_changes[chosen], expected[chosen], atol=1e-10)
    assert np.abs(result.changes).max() > 1e-4  # something was taken away
    counts = result.num_targets
    assert result.loss == pytest.approx((clean * counts).sum() / counts.sum())
    np.testing.assert_allclose(result.changes, (result.batch_changes * counts).sum(1) / counts.sum(), atol=1e-10)


@pytest.mark.parametrize("unit", UNITS)
def test_many_forward_passes_give_what_one_gives(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10 * BATCHES[0].tokens.numel() < ablation.TOKENS_AT_ONCE  # all units of a layer in one pass
    at_once = ablate(MODEL, BATCHES, unit)
    monkeypatch.setattr(ablation, "TOKENS_AT_ONCE", 1)
    np.testing.assert_allclose(ablate(MODEL, BATCHES, unit).batch_changes, at_once.batch_changes, atol=1e-12)


def test_a_result_names_what_it_holds() -> None:
    result = ablate(MODEL, BATCHES, "head", "zero", layers=[2, 0], indices=[1])
    assert result.labels == ("L2H1", "L0H1")
    assert (result.layers.tolist(), result.indices.tolist()) == ([2, 0], [1, 1])
    everything = ablate(MODEL, BATCHES, "head", "zero")
    assert everything.labels == ("L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1")
    np.testing.assert_allclose(result.changes, everything.changes[[5, 1]], atol=1e-6)
    assert [row["change"] for row in everything.rows()] == sorted(everything.changes, reverse=True)
    first = next(everything.rows())
    assert set(first) == {"layer", "head", "change", "standard_error"}
    assert everything.labels[everything.order[0]] == f"L{first['layer']}H{first['head']}"


def test_tokens_are_those_of_the_batches() -> None:
    result = ablate(MODEL, BATCHES, "feedforward")
    assert result.tokens.shape == (7, 11)
    assert np.array_equal(result.tokens[:4, :-1], BATCHES[0].tokens.numpy())
    assert result.tokens[0, -1] == BATCHES[0].targets[0, -1]
    assert result.tokens[1, -1] == PAD
    assert result.first_target == 1
    late = replace(BATCHES[0], targets=BATCHES[0].targets.clone())
    late.targets[:, :4] = IGNORED
    assert ablate(MODEL, [late], "feedforward").first_target == 5


def test_documents_are_the_sampling_unit() -> None:
    """However their windows lie in batches; without documents, sequences are."""
    documents = np.array([5, 5, 2, 9, 2, 2, 9])
    parts = [replace(batch, documents=part) for batch, part in zip(BATCHES, np.split(documents, [4]), strict=True)]
    rows = [one_row(batch, row) for batch in BATCHES for row in range(len(batch.tokens))]
    counts = np.array([row.num_targets for row in rows])
    sums = np.stack([ablate(MODEL, [row], "feedforward", "zero").changes for row in rows], axis=1) * counts
    for batches, clusters in ((parts, documents), (BATCHES, np.arange(7))):
        found = ablate(MODEL, batches, "feedforward", "zero")
        changes, errors = clustered_means(sums, counts, clusters)
        np.testing.assert_allclose(found.changes, changes)
        np.testing.assert_allclose(found.standard_errors, errors, rtol=1e-6)
        assert found.num_documents == len(set(clusters.tolist()))


@pytest.mark.parametrize("mode", MODES)
def test_without_the_previous_token_head_there_is_no_induction(circuit: Transformer, mode: str) -> None:
    """The circuit built by hand predicts a second copy perfectly, but for its first token; two heads do all of it."""
    batches = []
    for first in (0, 4):
        tokens = torch.tensor([repeated_tokens(10, seed=seed) for seed in range(first, first + 4)])
        targets = tokens[:, 1:].clone()
        targets[:, :11] = IGNORED
        batches.append(Batch(tokens[:, :-1].contiguous(), targets, int((targets != IGNORED).sum())))
    result = ablate(circuit, batches, "head", mode)
    assert result.loss < 1e-4
    needed = [result.labels.index(f"L{layer}H{head}") for layer, head in (PREVIOUS, INDUCTION)]
    assert result.changes[needed].min() > np.log(24)  # worse than a uniform guess
    assert (result.changes[needed] > 10 * result.standard_errors[needed]).all()
    assert np.abs(np.delete(result.changes, needed)).max() < 1e-6
    assert result.holds


def test_receipts_show_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is half of what it should be, one at the wrong stage, and blocks that continue from elsewhere."""
    written = Unit.written
    for target, name, wrong in (
        (Unit, "written", lambda *arguments: written(*arguments) / 2),
        (ablation, "find_unit", lambda name: replace(UNITS["head"], stage="pre")),
        (ablation, "stream_after", lambda model, layer, stage, stream: stream),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, wrong)
            nothing, strongest = ablate(MODEL, BATCHES).receipts
        assert (nothing.holds, strongest.holds) == (name != "stream_after", False)


@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [5, 3, 1, 4], [5, 1], [2, 2, 2]])
def test_donors(lengths: list[int]) -> None:
    real = torch.arange(5) < torch.tensor(lengths)[:, None]
    seen = set()
    for seed in range(20):
        donors = draw_donors(real, torch.Generator().manual_seed(seed))
        seen.add(tuple(donors.flatten().tolist()))
        for row, length in enumerate(lengths):
            for position in range(5):
                donor = int(donors[row, position])
                others = [n for n in range(len(lengths)) if n != row and lengths[n] > position]
                if position >= length or not others:
                    assert donor == row
                else:
                    assert donor in others
    assert len(seen) == 1 or len(lengths) > 2


def test_donors_of_whole_sequences_are_one_circle() -> None:
    donors = draw_donors(torch.ones(6, 3, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert (donors == donors[:, :1]).all()
    at, visited = 0, []
    for _ in range(6):
        visited.append(at)
        at = int(donors[at, 0])
    assert (sorted(visited), at) == (list(range(6)), 0)


def test_the_seed_draws_the_donors() -> None:
    changes = [ablate(MODEL, BATCHES, "head", "resample", seed=seed).changes for seed in (1, 1, 2, 3, 4)]
    assert np.array_equal(changes[0], changes[1])
    assert any(not np.array_equal(changes[0], other) for other in changes[2:])


@pytest.mark.parametrize(
    ("unit", "mode", "batches", "named"),
    [
        ("heads", "mean", BATCHES, "'heads'"),
        ("head", "meen", BATCHES, "'meen'"),
        ("head", "resample", [batch_of([11])], "another sequence of the batch"),
    ],
)
def test_refused(unit: str, mode: str, batches: list[Batch], named: str) -> None:
    with pytest.raises(LumiereError, match=named):
        ablate(MODEL, batches, unit, mode)
