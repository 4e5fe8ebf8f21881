"""Ablations: many at once against hooks one by one, and the laws that they obey."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumiere.components.hooks import HookPoint, hooked, run_with_cache
from lumiere.components.kernels import IGNORED
from lumiere.config.loader import validate
from lumiere.data.batches import Batch
from lumiere.data.tokenizer import PAD
from lumiere.errors import LumiereError
from lumiere.interpret.ablation import MODES, TOKENS_AT_ONCE, UNITS, Unit, ablate, draw_donors
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.runs import Run
from tests.interpret.circuits import INDUCTION, PREVIOUS, induction_circuit, repeated_tokens
from tests.interpret.padded import batch_of

SIZES = {"embedding_size": 12, "context_size": 16, "num_layers": 3, "num_heads": 2, "d_key": 5, "d_value": 7, "d_ff": 9}


@pytest.fixture(params=["learned", "rotary", "trained"])
def model(request: pytest.FixtureRequest, trained_run: Run) -> Transformer:
    """Two random models, whose weights are large enough that every part matters, and a trained one, in float64."""
    if request.param == "trained":
        return trained_run.load_model("best").double()
    return random_model(positions=request.param).double()


def random_model(**changes: Any) -> Transformer:
    torch.manual_seed(1)
    sizes = SIZES | ({"d_key": 6} if changes.get("positions") == "rotary" else {}) | changes
    model = build_model(validate({"model": {**sizes, "dropout": 0.5}})).eval()
    for parameter in model.parameters():
        parameter.data *= 15 if parameter.ndim == 2 else 1
    return model


BATCHES = [batch_of([11, 10, 7, 11]), batch_of([4, 11, 11], seed=1)]


def mean_loss(model: Transformer, batch: Batch) -> float:
    logits = model(batch.tokens).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED).item()


def hook_of(unit: str, layer: int) -> str:
    names = {"head": "attn.hook_z", "neuron": "mlp.hook_post", "feedforward": "hook_mlp_out"}
    return f"blocks.{layer}.{names.get(unit, 'hook_resid_pre')}"


def put(unit: str, activation: Tensor, replacement: Tensor, index: int) -> Tensor:
    """The activation with unit `index` replaced by that of `replacement`, of the same shape."""
    changed = activation.clone()
    match unit:
        case "head":
            changed[:, :, index] = replacement[:, :, index]
        case "neuron":
            changed[:, :, index] = replacement[:, :, index]
        case "position":
            changed[:, index] = replacement[:, index]
        case _:
            changed = replacement
    return changed


def replacements(model: Transformer, unit: str, layer: int, mode: str, donors: list[Tensor]) -> list[Tensor]:
    """What comes in place of the activation at `hook_of`, for each batch; for a layer, of what it adds."""
    old = []
    for batch in BATCHES:
        _, cache = run_with_cache(model, batch.tokens)
        added = cache[f"blocks.{layer}.hook_resid_post"] - cache[f"blocks.{layer}.hook_resid_pre"]
        old.append(added if unit == "layer" else cache[hook_of(unit, layer)])
    if mode == "zero":
        return [torch.zeros_like(activation) for activation in old]
    if mode == "mean":
        rows = torch.cat([activation[batch.tokens != PAD] for activation, batch in zip(old, BATCHES, strict=True)])
        return [rows.mean(0).expand_as(activation) for activation in old]
    return [
        torch.stack([torch.stack([a[d[b, t], t] for t in range(a.shape[1])]) for b in range(len(a))])
        for a, d in zip(old, donors, strict=True)
    ]


@torch.no_grad()
def one_by_one(model: Transformer, unit: str, mode: str, layer: int, index: int, donors: list[Tensor]) -> np.ndarray:
    """The loss of each batch in a whole forward pass with the one unit replaced by a hook."""
    losses = []
    for batch, new in zip(BATCHES, replacements(model, unit, layer, mode, donors), strict=True):
        hooks: dict[str, Callable[[Tensor], Tensor]]
        if unit == "layer":
            # What the layer adds comes whole from its first part, and nothing from its second.
            hooks = {
                f"blocks.{layer}.hook_attn_out": lambda _, new=new: new,
                f"blocks.{layer}.hook_mlp_out": torch.zeros_like,
            }
        else:
            hooks = {hook_of(unit, layer): lambda activation, new=new: put(unit, activation, new, index)}
        with hooked(model, hooks):
            losses.append(mean_loss(model, batch))
    return np.array(losses)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("unit", UNITS)
def test_many_at_once_are_what_hooks_do_one_by_one(model: Transformer, unit: str, mode: str) -> None:
    result = ablate(model, BATCHES, unit, mode, seed=3)
    generator = torch.Generator().manual_seed(3)
    donors = [draw_donors(batch.tokens != PAD, generator) for batch in BATCHES]
    with torch.no_grad():
        clean = np.array([mean_loss(model, batch) for batch in BATCHES])
    np.testing.assert_allclose(result.batch_losses, clean, rtol=1e-10)
    expected = [
        one_by_one(model, unit, mode, layer, index, donors) - clean
        for layer, index in zip(result.layers, result.indices, strict=True)
    ]
    np.testing.assert_allclose(result.batch_changes, expected, atol=1e-10)
    assert np.abs(result.changes).max() > 1e-4  # something was taken away
    assert result.holds


@pytest.mark.parametrize("unit", UNITS)
def test_many_forward_passes_give_what_one_gives(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model().double()
    assert 10 * BATCHES[0].tokens.numel() < TOKENS_AT_ONCE  # all units of a layer in one pass
    at_once = ablate(model, BATCHES, unit)
    monkeypatch.setattr("lumiere.interpret.ablation.TOKENS_AT_ONCE", 1)
    np.testing.assert_allclose(ablate(model, BATCHES, unit).batch_changes, at_once.batch_changes, atol=1e-12)


def test_a_result_names_what_it_holds() -> None:
    result = ablate(random_model(), BATCHES, "head", "zero", layers=[2, 0], indices=[1])
    assert result.labels == ("L2H1", "L0H1")
    assert (result.layers.tolist(), result.indices.tolist()) == ([2, 0], [1, 1])
    everything = ablate(random_model(), BATCHES, "head", "zero")
    assert everything.labels == ("L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1")
    np.testing.assert_allclose(result.changes, everything.changes[[5, 1]], atol=1e-6)
    assert [row["change"] for row in everything.rows()] == sorted(everything.changes, reverse=True)
    first = next(everything.rows())
    assert set(first) == {"layer", "head", "change", "standard_error"}
    assert everything.labels[everything.order[0]] == f"L{first['layer']}H{first['head']}"


def test_tokens_are_those_of_the_batches() -> None:
    result = ablate(random_model(), BATCHES, "feedforward")
    assert result.tokens.shape == (7, 11)
    assert np.array_equal(result.tokens[:4, :-1], BATCHES[0].tokens.numpy())
    assert result.tokens[0, -1] == BATCHES[0].targets[0, -1]
    assert result.tokens[1, -1] == PAD
    assert result.first_target == 1
    late = dataclasses.replace(BATCHES[0], targets=BATCHES[0].targets.clone())
    late.targets[:, :4] = IGNORED
    assert ablate(random_model(), [late], "feedforward").first_target == 5


def test_documents_are_the_sampling_unit() -> None:
    """The error is that of documents, however their windows lie in batches; without documents, of sequences."""
    model, documents = random_model().double(), np.array([5, 5, 2, 9, 2, 2, 9])
    parts = [
        dataclasses.replace(batch, documents=part)
        for batch, part in zip(BATCHES, (documents[:4], documents[4:]), strict=True)
    ]
    found = ablate(model, parts, "feedforward", "zero")
    single = [
        [
            ablate(
                model,
                [Batch(batch.tokens[row : row + 1], batch.targets[row : row + 1], int(count))],
                "feedforward",
                "zero",
            )
            for row, count in enumerate((batch.targets != IGNORED).sum(1))
        ]
        for batch in BATCHES
    ]
    rows = [one for part in single for one in part]
    sums = np.array([[row.changes[unit] * row.num_targets[0] for row in rows] for unit in range(3)])
    counts = np.array([row.num_targets[0] for row in rows])
    assert found.num_documents == 3
    for unit in range(3):
        deviations = [
            (sums[unit] - found.changes[unit] * counts)[documents == document].sum() for document in (2, 5, 9)
        ]
        expected = np.sqrt(3 / 2 * np.square(deviations).sum()) / counts.sum()
        assert found.standard_errors[unit] == pytest.approx(expected, rel=1e-6)
    apart = ablate(model, BATCHES, "feedforward", "zero")
    assert apart.num_documents == 7
    np.testing.assert_allclose(apart.changes, found.changes)
    expected = np.sqrt(7 / 6 * np.square(sums - apart.changes[:, None] * counts).sum(1)) / counts.sum()
    np.testing.assert_allclose(apart.standard_errors, expected, rtol=1e-6)


def test_a_single_document_has_no_error() -> None:
    batch = dataclasses.replace(BATCHES[0], documents=np.zeros(4, dtype=int))
    result = ablate(random_model(), [batch], "feedforward")
    assert np.isnan(result.standard_errors).all()
    np.testing.assert_allclose(result.changes, result.batch_changes[:, 0])


def test_loss_and_changes_are_means_over_tokens() -> None:
    model = random_model().double()
    result = ablate(model, BATCHES, "feedforward")
    counts = np.array([batch.num_targets for batch in BATCHES])
    assert result.loss == pytest.approx((result.batch_losses * counts).sum() / counts.sum())
    np.testing.assert_allclose(result.changes, (result.batch_changes * counts).sum(1) / counts.sum())


def test_a_head_that_writes_nothing_is_not_missed() -> None:
    model = random_model()
    model.blocks[1].attention.output.weight.data[:, 7:] = 0
    for mode in MODES:
        result = ablate(model, BATCHES, "head", mode)
        assert result.batch_changes[3].tolist() == pytest.approx([0, 0], abs=1e-6)
        assert np.abs(result.batch_changes[2]).max() > 1e-3


@pytest.mark.parametrize("unit", UNITS)
def test_replacing_an_activation_with_itself_changes_nothing(unit: str) -> None:
    """Sequences that are all alike resample from their likes."""
    batch = batch_of([11])
    alike = Batch(batch.tokens.repeat(4, 1), batch.targets.repeat(4, 1), 4 * batch.num_targets)
    result = ablate(random_model(), [alike], unit, "resample")
    assert np.abs(result.changes).max() < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_without_the_previous_token_head_there_is_no_induction(mode: str) -> None:
    """The circuit built by hand predicts a second copy perfectly, but for its first token; two heads do all of it."""
    batches = []
    for first in (0, 4):
        tokens = torch.tensor([repeated_tokens(10, seed=seed) for seed in range(first, first + 4)])
        targets = tokens[:, 1:].clone()
        targets[:, :11] = IGNORED
        batches.append(Batch(tokens[:, :-1].contiguous(), targets, int((targets != IGNORED).sum())))
    result = ablate(induction_circuit(), batches, "head", mode)
    assert result.loss < 1e-4
    needed = [result.labels.index(f"L{layer}H{head}") for layer, head in (PREVIOUS, INDUCTION)]
    assert result.changes[needed].min() > np.log(24)  # worse than a uniform guess
    assert (result.changes[needed] > 10 * result.standard_errors[needed]).all()
    assert np.abs(np.delete(result.changes, needed)).max() < 1e-6
    assert result.holds


def test_a_position_acts_on_no_earlier_prediction() -> None:
    """Only the predictions before position 6 count."""
    batch = batch_of([11, 11, 11])
    batch.targets[:, 6:] = IGNORED
    early = dataclasses.replace(batch, num_targets=18)
    for mode in MODES:
        changes = ablate(random_model(), [early], "position", mode).changes.reshape(3, 10)
        assert np.abs(changes[:, 6:]).max() < 1e-6
        assert np.abs(changes[:, :6]).min() > 1e-5


def test_the_direct_effect_of_the_last_feedforward_is_its_logit_attribution() -> None:
    """At the frozen scale of the final norm, zero ablation takes exactly its attribution from each logit."""
    model = random_model().double()
    batch = BATCHES[0]
    with torch.no_grad():
        output, cache = run_with_cache(model, batch.tokens)
        written_BTE, scale_BT1 = cache["blocks.2.hook_mlp_out"], cache["ln_final.hook_scale"]
        attribution = (written_BTE / scale_BT1 * model.final_norm.weight) @ model.token_embedding.weight.T
        change_BTE = UNITS["feedforward"].written(model.blocks[2], -written_BTE, [0])[0]
        stream = {"blocks.2.hook_resid_post": lambda stream_BTE: stream_BTE + change_BTE}
        with hooked(model, stream | {"ln_final.hook_scale": lambda _: scale_BT1}):
            ablated = model(batch.tokens).logits
    torch.testing.assert_close(ablated - output.logits, -attribution)


def test_the_model_is_left_as_it_was() -> None:
    model = random_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = [batch.tokens.clone() for batch in BATCHES]
    for unit in UNITS:
        ablate(model, BATCHES, unit)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(batch.tokens, old) for batch, old in zip(BATCHES, tokens, strict=True))
    assert all(module.hook is None for module in model.modules() if isinstance(module, HookPoint))


def test_receipts_show_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is half of what it should be, and a model whose blocks continue from another stream."""
    model = random_model()
    written = Unit.written
    monkeypatch.setattr(Unit, "written", lambda *arguments: written(*arguments) / 2)
    nothing, strongest = ablate(model, BATCHES).receipts
    assert nothing.holds
    assert not strongest.holds
    monkeypatch.undo()
    monkeypatch.setattr(
        "lumiere.interpret.ablation.find_unit", lambda name: dataclasses.replace(UNITS["head"], stage="pre")
    )
    nothing, strongest = ablate(model, BATCHES).receipts
    assert nothing.holds
    assert not strongest.holds
    monkeypatch.undo()
    monkeypatch.setattr("lumiere.interpret.ablation.stream_after", lambda model, layer, stage, stream: stream)
    assert not ablate(model, BATCHES).receipts[0].holds


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
    changes = [ablate(random_model(), BATCHES, "head", "resample", seed=seed).changes for seed in (1, 1, 2, 3, 4)]
    assert np.array_equal(changes[0], changes[1])
    assert any(not np.array_equal(changes[0], other) for other in changes[2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heads", "mean"), "no unit 'heads' .did you mean head"),
        (("xyz", "mean"), "no unit 'xyz' .choose one of head, feedforward, layer, neuron, position"),
        (("head", "meen"), "no mode 'meen' .did you mean mean"),
        (("head", "xyz"), "no mode 'xyz' .choose one of mean, zero, resample"),
    ],
)
def test_names_that_do_not_exist(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(LumiereError, match=message):
        ablate(random_model(), BATCHES, *arguments)


def test_one_sequence_has_nothing_to_resample_from() -> None:
    with pytest.raises(LumiereError, match="another sequence of the batch"):
        ablate(random_model(), [batch_of([11])], "head", "resample")
