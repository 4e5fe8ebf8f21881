"""Cut edges: laws that hold on every architecture, and a cut by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumiere.components.hooks import hooked, run_with_cache
from lumiere.errors import LumiereError
from lumiere.interpret.edge_ablation import ABLATIONS, EdgeRuns, replacements
from lumiere.interpret.edge_attribution import edge_attribution, integrated_attribution
from lumiere.interpret.metrics import logit_difference
from lumiere.interpret.prompts import PromptPairs
from lumiere.models.transformer import Transformer
from tests.models.build import EACH_VARIANT, VARIANTS, make_model

CLEAN = torch.tensor([[1, 4, 7, 5, 6], [3, 5, 8, 0, 1], [9, 9, 3, 4, 5]])
CORRUPT = torch.tensor([[1, 6, 7, 5, 4], [3, 5, 0, 8, 1], [4, 9, 3, 9, 7]])


def pairs_of() -> PromptPairs:
    positions, targets, versus = (torch.tensor(ids) for ids in ([4, 3, 4], [2, 5, 7], [3, 1, 8]))
    return PromptPairs(CLEAN, CORRUPT, positions, targets, versus, np.arange(3))


def runs_of(model: Transformer, ablation: str = "corrupt") -> EdgeRuns:
    with torch.no_grad():
        return EdgeRuns(model, pairs_of(), logit_difference, ablation)


@pytest.fixture(scope="module", params=EACH_VARIANT)
def runs(request: pytest.FixtureRequest) -> EdgeRuns:
    return runs_of(make_model(**VARIANTS[request.param]).double())


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


@torch.no_grad()
def test_none_and_all_edges_cut_are_the_clean_and_the_corrupt_run(runs: EdgeRuns) -> None:
    none, everything = runs.cut(torch.stack([torch.zeros(runs.num_edges), torch.ones(runs.num_edges)]))
    assert largest(none - runs.clean_B) < 1e-11
    assert largest(everything - runs.corrupt_B) < 1e-11
    assert largest(none - everything) > 0.01


@torch.no_grad()
def test_each_edge_alone_equals_whole_forward_passes(runs: EdgeRuns) -> None:
    assert largest(runs.each_edge() - runs.cut(torch.eye(runs.num_edges))) < 1e-11


@torch.no_grad()
def test_all_edges_of_a_writer_cut_replace_it(runs: EdgeRuns) -> None:
    for writer in range(len(runs.graph.writers)):
        leaves = torch.tensor([[float(source == writer) for _, source in runs.graph.edges]])
        assert largest(runs.cut(leaves)[0] - runs.replace_writer(writer)) < 1e-11


def test_attribution_of_a_writer_is_its_gradient_times_its_change(runs: EdgeRuns) -> None:
    """The sum over readers of EAP is attribution patching of the writer (Nanda 2023)."""
    scores = edge_attribution(runs).sum(1)
    embedding = runs.clean_WBTE[0].clone().requires_grad_()
    with hooked(runs.model, {"hook_embed": lambda _: embedding}):
        metric = runs.measured(runs.model.final_residual(runs.pairs.clean)).sum()
    (gradient,) = torch.autograd.grad(metric, embedding)
    expected = ((runs.clean_WBTE[0] - runs.corrupt_WBTE[0]) * gradient).sum()
    found = sum(score for score, (_, writer) in zip(scores, runs.graph.edges, strict=True) if writer == 0)
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_integrated_attribution_of_the_embedding_adds_up() -> None:
    runs = runs_of(make_model(std=0.2).double())
    scores = integrated_attribution(runs, steps=32)
    found = sum(score for score, (_, writer) in zip(scores, runs.graph.edges, strict=True) if writer == 0)
    assert found == pytest.approx((runs.clean_B - runs.corrupt_B).numpy(), abs=1e-2)


def test_attribution_is_right_to_first_order() -> None:
    """For a change a tenth as large, the error of an edge is a hundredth."""
    model = make_model().double()
    errors = []
    for size in (1e-2, 1e-3):
        runs = runs_of(model)
        runs.replacement_WBTE = runs.clean_WBTE + size * (runs.corrupt_WBTE - runs.clean_WBTE)
        with torch.no_grad():
            exact = runs.clean_B - runs.each_edge()
        errors.append(largest(exact - edge_attribution(runs)))
    assert errors[1] < errors[0] / 50


@torch.no_grad()
def test_an_edge_to_keys_cut_by_hand() -> None:
    """Everything written out for one model: one head's keys see what a head of layer 0 wrote on the other prompt."""
    model = make_model(num_heads=2).double()
    runs = runs_of(model)
    writer, reader = "L0H1", "L1H0.k"
    _, cache = run_with_cache(model, CLEAN)
    _, other = run_with_cache(model, CORRUPT)
    attention, size = model.blocks[1].attention, model.d_value
    written = [x["blocks.0.attn.hook_z"][:, :, 1] @ model.blocks[0].attention.output.weight[:, size : 2 * size].T
               for x in (cache, other)]  # fmt: skip
    stream = cache["blocks.1.hook_resid_pre"] + written[1] - written[0]
    normalized = (
        stream
        / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        * model.blocks[1].attention_norm.get_parameter("weight")
    )
    keys = cache["blocks.1.attn.hook_k"].clone()
    keys[:, :, 0] = normalized @ attention.key.weight[: model.d_key].T
    with hooked(model, {"blocks.1.attn.hook_k": lambda _: keys}):
        logits = model(CLEAN).logits
    read = logits[torch.arange(3), pairs_of().positions]
    expected = (read * (F.one_hot(torch.tensor([2, 5, 7]), 13) - F.one_hot(torch.tensor([3, 1, 8]), 13))).sum(-1)
    assert largest(runs.each_edge()[runs.graph.names.index((writer, reader))] - expected) < 1e-12
    assert largest(expected - runs.clean_B) > 1e-4


def test_what_cut_edges_carry() -> None:
    clean, corrupt = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    both = np.concatenate([clean, corrupt], axis=1)
    found = {name: replacements(clean, corrupt, name).numpy() for name in ABLATIONS}
    assert np.array_equal(found["corrupt"], corrupt)
    assert np.allclose(found["mean-per-position"], both.mean(1, keepdims=True))
    assert np.allclose(found["mean"], both.mean((1, 2), keepdims=True))
    assert not found["zero"].any()
    with pytest.raises(LumiereError):
        replacements(clean, corrupt, "noise")
