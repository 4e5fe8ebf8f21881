"""The logit lens against the numpy model, and the laws that it obeys."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lumiere.interpret import logit_lens as lens_module
from lumiere.interpret.logit_lens import decisions, logit_lens
from lumiere.models.transformer import Transformer
from tests import reference
from tests.interpret.models import TOKENS, random_model


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_every_statistic_is_that_of_the_numpy_model(model: Transformer) -> None:
    result = logit_lens(model, TOKENS, top_k=3)
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    _, _, stream = reference.transformer(weights, TOKENS, model.settings)
    gain, unembed = weights["final_norm.weight"], weights["token_embedding.weight"].T
    for stage in range(model.num_layers + 1):
        for position in range(len(TOKENS)):
            final = softmax(reference.norm(stream[-1][position], gain) @ unembed)
            here = softmax(reference.norm(stream[stage][position], gain) @ unembed)
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


def test_a_feedforward_part_that_writes_nothing_changes_nothing_after_the_attention(model: Transformer) -> None:
    changed = copy.deepcopy(model)
    changed.get_parameter("blocks.1.feedforward.down.weight").data.zero_()
    result = logit_lens(changed, TOKENS, sublayers=True)
    mid, post = (result.stages.index(f"blocks.1.hook_resid_{part}") for part in ("mid", "post"))
    assert np.array_equal(result.entropies[mid], result.entropies[post])
    earlier = result.stages.index("blocks.0.hook_resid_post")
    assert not np.array_equal(result.entropies[mid], result.entropies[earlier])


@given(arrays(int, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.integers(0, 2)))
def test_decision_depth_by_trying_every_stage(top_tokens: np.ndarray) -> None:
    for column, depth in enumerate(decisions(top_tokens)):
        tokens = top_tokens[:, column].tolist()
        assert depth == min(stage for stage in range(len(tokens)) if set(tokens[stage:]) == {tokens[-1]})


def test_rows_and_positions_and_where_the_text_ends_nothing_is_asked_for(model: Transformer) -> None:
    result = logit_lens(model, TOKENS)
    assert result.receipts[0].error == result.receipts[0].tolerance == 0  # the last stage is the model bit for bit
    assert not result.divergences[-1].any()
    assert result.targets.tolist() == [*TOKENS[1:], -1]
    assert np.isnan(result.target_probabilities[:, -1]).all()
    assert (result.target_ranks[:, -1] == -1).all()
    *_, first, last = result.rows()
    assert (first["position"], first["token"], first["target"]) == (8, 4, 1)
    assert first["entropy"] == result.entropies[-1, 8]
    some = logit_lens(model, TOKENS, [4, 0])
    assert (some.positions, some.targets.tolist()) == ((4, 0), [TOKENS[5], TOKENS[1]])
    assert np.array_equal(some.entropies, result.entropies[:, [4, 0]])
    assert (last["target"], last["target_rank"], last["is_decided"]) == (None, None, True)


def test_receipts_show_what_is_wrong(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lens_module.run_with_cache

    def shifted(*arguments: Any) -> Any:
        output, cache = run(*arguments)
        return dataclasses.replace(output, logits=output.logits + 1e-6 * torch.rand_like(output.logits)), cache

    monkeypatch.setattr(lens_module, "run_with_cache", shifted)
    assert not logit_lens(model, TOKENS).receipts[0].holds
