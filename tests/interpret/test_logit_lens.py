"""The logit lens against the numpy model, and the laws that it obeys."""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lumiere.components.hooks import HookPoint
from lumiere.config.loader import validate
from lumiere.interpret import logit_lens as lens_module
from lumiere.interpret.logit_lens import decisions, logit_lens, stage_names
from lumiere.models.transformer import Transformer, build_model
from lumiere.persistence.runs import Run
from tests import reference

TOKENS = [0, 70, 71, 72, 70, 71, 9, 300, 4, 1]


def random_model() -> Transformer:
    """Three layers of two heads, with gains and weights that make every stage say something else."""
    sizes = {"embedding_size": 12, "context_size": 16, "num_layers": 3, "num_heads": 2, "d_key": 5, "d_value": 7}
    torch.manual_seed(1)
    model = build_model(validate({"model": {**sizes, "d_ff": 9}, "tokenizer": {"vocab_size": 320}})).eval()
    for parameter in model.parameters():
        parameter.data *= 20 if parameter.ndim == 2 else 1 + torch.rand_like(parameter)
    return model


@pytest.fixture(scope="module", params=["random", "trained"])
def model(request: pytest.FixtureRequest, trained_run: Run) -> Transformer:
    return random_model() if request.param == "random" else trained_run.load_model("best").eval()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_every_statistic_is_that_of_the_numpy_model(model: Transformer) -> None:
    result = logit_lens(model, TOKENS, top_k=3)
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    _, _, stream = reference.transformer(weights, TOKENS, model.num_heads)
    gain, unembed = weights["final_norm.weight"], weights["token_embedding.weight"].T
    for stage in range(model.num_layers + 1):
        for position in range(len(TOKENS)):
            final = softmax(reference.rms_norm(stream[-1][position], gain) @ unembed)
            here = softmax(reference.rms_norm(stream[stage][position], gain) @ unembed)
            best = np.argsort(-here)[:3]
            place = (stage, position)
            assert result.top_tokens[place].tolist() == best.tolist()
            np.testing.assert_allclose(result.top_probabilities[place], here[best], atol=1e-5)
            assert result.entropies[place] == pytest.approx(-(here * np.log(here)).sum(), abs=1e-4)
            assert result.divergences[place] == pytest.approx((final * np.log(final / here)).sum(), abs=1e-4)
            if position + 1 < len(TOKENS):
                following = TOKENS[position + 1]
                assert result.target_probabilities[place] == pytest.approx(here[following], abs=1e-5)
                assert result.target_ranks[place] == (here > here[following]).sum()
    # The stages differ: the comparison above is not one of equal rows.
    assert np.abs(np.diff(result.entropies, axis=0)).max() > 0.01


@pytest.mark.parametrize("sublayers", [False, True])
def test_the_last_stage_is_the_model_bit_for_bit(model: Transformer, sublayers: bool) -> None:
    result = logit_lens(model, TOKENS, sublayers=sublayers)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    assert result.holds
    assert result.receipts[0].error == result.receipts[0].tolerance == 0
    assert result.top_tokens[-1, :, 0].tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(result.top_probabilities[-1, :, 0], logits.double().softmax(-1).amax(-1), rtol=1e-12)
    assert not result.divergences[-1].any()
    losses = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(TOKENS[1:]), reduction="none")
    np.testing.assert_allclose(-np.log(result.target_probabilities[-1, :-1]), losses.numpy(), atol=1e-9)


def test_rank_of_the_final_top_token_ends_at_0(model: Transformer) -> None:
    final = logit_lens(model, TOKENS).top_tokens[-1, -1, 0]
    result = logit_lens(model, TOKENS, positions=[len(TOKENS) - 1], target=int(final))
    assert result.targets.tolist() == [final]
    assert result.target_ranks[-1].tolist() == [0]
    assert result.target_probabilities[-1, 0] == result.top_probabilities[-1, 0, 0]


def test_tied_tokens_share_their_places() -> None:
    """Two pairs of tokens with equal rows, and a model whose tokens are all tied."""
    model = random_model()
    rows_VE = model.token_embedding.weight.data
    rows_VE[TOKENS[3]] = rows_VE[200]
    final = logit_lens(model, TOKENS[:3]).top_tokens[-1, 2, 0]
    twin = 201 if final != 201 else 202
    rows_VE[twin] = rows_VE[final]
    for target in (int(final), twin):
        result = logit_lens(model, TOKENS[:3], [2], target=target)
        assert (result.target_ranks[-1, 0], result.target_ties[-1, 0]) == (0, 2)
        assert (result.target_places[-1, 0], result.target_on_top[-1, 0]) == (0.5, 0.5)
    rows_VE.zero_()
    uniform = logit_lens(model, TOKENS)
    np.testing.assert_allclose(uniform.target_on_top[:, :-1], 1 / 320)
    np.testing.assert_allclose(uniform.target_places[:, :-1], sum(range(320)) / 320)
    assert np.isnan(uniform.target_on_top[:, -1]).all()
    assert np.isnan(uniform.target_places[:, -1]).all()


def test_many_positions_are_what_each_is_alone(model: Transformer) -> None:
    """Of a causal model the last position of a beginning says what that position says within the whole."""
    everything = logit_lens(model, TOKENS, sublayers=True, top_k=2).arrays()
    for length in range(1, len(TOKENS)):
        alone = logit_lens(model, TOKENS[:length], [length - 1], sublayers=True, target=TOKENS[length], top_k=2)
        for name, values in alone.arrays().items():
            expected = everything[name].take([length - 1], axis=min(1, values.ndim - 1))
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_positions_are_chosen(model: Transformer) -> None:
    everything, part = logit_lens(model, TOKENS), logit_lens(model, TOKENS, [4, 0])
    assert part.positions == (4, 0)
    assert part.targets.tolist() == [TOKENS[5], TOKENS[1]]
    assert np.array_equal(part.entropies, everything.entropies[:, [4, 0]])
    assert np.array_equal(part.top_tokens, everything.top_tokens[:, [4, 0]])


def test_a_feedforward_part_that_writes_nothing_changes_nothing_after_the_attention(model: Transformer) -> None:
    changed = copy.deepcopy(model)
    changed.blocks[1].feedforward.down.weight.data.zero_()
    result = logit_lens(changed, TOKENS, sublayers=True)
    mid, post = (result.stages.index(f"blocks.1.hook_resid_{part}") for part in ("mid", "post"))
    assert np.array_equal(result.entropies[mid], result.entropies[post])
    earlier = result.stages.index("blocks.0.hook_resid_post")
    assert not np.array_equal(result.entropies[mid], result.entropies[earlier])


def test_stages_follow_the_computation() -> None:
    assert stage_names(1, sublayers=False) == ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    assert stage_names(2, sublayers=True)[1:] == [
        f"blocks.{layer}.hook_resid_{part}" for layer in (0, 1) for part in ("mid", "post")
    ]


@given(arrays(int, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.integers(0, 2)))
def test_decision_depth_by_trying_every_stage(top_tokens: np.ndarray) -> None:
    for column, depth in enumerate(decisions(top_tokens)):
        tokens = top_tokens[:, column].tolist()
        assert depth == min(stage for stage in range(len(tokens)) if set(tokens[stage:]) == {tokens[-1]})


def test_where_the_text_ends_nothing_is_asked_for(model: Transformer) -> None:
    result = logit_lens(model, TOKENS)
    assert result.targets.tolist() == [*TOKENS[1:], -1]
    assert np.isnan(result.target_probabilities[:, -1]).all()
    assert (result.target_ranks[:, -1] == -1).all()
    last = list(result.rows())[-1]
    assert (last["target"], last["target_rank"], last["is_decided"]) == (None, None, True)


def test_rows_are_the_arrays(model: Transformer) -> None:
    result = logit_lens(model, TOKENS)
    rows = list(result.rows())
    assert len(rows) == len(result.stages) * len(TOKENS)
    row = rows[2 * len(TOKENS) + 3]
    assert (row["stage"], row["position"], row["token"]) == (result.stages[2], 3, TOKENS[3])
    assert row["entropy"] == result.entropies[2, 3]
    assert row["target_rank"] == result.target_ranks[2, 3]
    assert row["is_decided"] == (result.decision_stages[3] <= 2)


def test_the_model_is_left_as_it_was(model: Transformer) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logit_lens(model, TOKENS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.hook is None for module in model.modules() if isinstance(module, HookPoint))


def test_receipts_show_what_is_wrong(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lens_module.run_with_cache

    def shifted(*arguments: Any) -> Any:
        output, cache = run(*arguments)
        return dataclasses.replace(output, logits=output.logits + 1e-6 * torch.rand_like(output.logits)), cache

    monkeypatch.setattr(lens_module, "run_with_cache", shifted)
    assert not logit_lens(model, TOKENS).receipts[0].holds


def test_a_model_that_is_broken_fails_every_law() -> None:
    model = random_model()
    model.final_norm.weight.data[0] = math.nan
    assert [receipt.holds for receipt in logit_lens(model, TOKENS).receipts] == [False, False, False]


def test_the_norm_takes_each_stages_own_scale(model: Transformer) -> None:
    """With the last stage's scale for all, the entropies of the others would be others."""
    with torch.no_grad():
        stream = model(torch.tensor([TOKENS])).hidden_states[0]
        scale = (stream[-1].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        frozen = ((stream[0] / scale * model.final_norm.weight) @ model.token_embedding.weight.T).softmax(-1)
    entropies = torch.special.entr(frozen).sum(-1).numpy()
    assert np.abs(logit_lens(model, TOKENS).entropies[0] - entropies).max() > 0.01
