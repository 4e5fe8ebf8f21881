"""Steered generation against full forward passes in which the stream is changed by hand, and its count."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from lumiere.components.hooks import run_with_cache
from lumiere.generation.kv_cache import CachedDecoder, slide
from lumiere.generation.steering import SteeredDecoder, Steering
from lumiere.models.transformer import Transformer
from tests.generation.conftest import CONTEXT_SIZE, random_model
from tests.generation.test_kv_cache import VARIANT, Variant, assert_same, tokens_at
from tests.models.build import ROTARY


def by_hand(model: Transformer, window: list[int], start: int, vector_E: Tensor, first: int) -> Tensor:
    """The logits after a window that begins at `start`, with a vector added to the output of block 0."""
    with torch.no_grad():
        _, cache = run_with_cache(model, torch.tensor([window]), ["blocks.0.hook_resid_post"])
        resid_1TE = cache["blocks.0.hook_resid_post"].clone()
        resid_1TE[:, max(0, first - start) :] += vector_E
        return model.unembed(model.continue_from(resid_1TE, 1))[0, -1]


@VARIANT
def test_each_step_is_that_of_a_forward_pass_with_the_vector_added_by_hand(variant: Variant) -> None:
    """From text position 3 on, also after a window has slid; rows of two lengths."""
    model = random_model(torch.float64, **variant)
    vector_E = torch.linspace(-2, 3, 32, dtype=torch.float64)
    steering = Steering({0: vector_E}, first=3)
    decoder = SteeredDecoder(CachedDecoder(model), model, steering)
    windows, starts = [[0, 3], list(range(3, 3 + CONTEXT_SIZE - 1))], [0, 0]
    found_BV = decoder.start(windows)
    num_edits = CONTEXT_SIZE - 1 - 3
    for step in range(5):
        expected = [by_hand(model, *row, vector_E, 3) for row in zip(windows, starts, strict=True)]
        assert_same(found_BV, torch.stack(expected), 1e-10)
        assert (steering.num_edits, steering.num_expected) == (num_edits, num_edits)
        if slid := slide(windows, CONTEXT_SIZE):
            starts[1] += CONTEXT_SIZE // 2
            assert slid == [1]
            num_edits += CONTEXT_SIZE // 2  # computed again
        for window, token in zip(windows, tokens_at(step, 2), strict=True):
            window.append(token)
        num_edits += sum(start + len(window) > 3 for window, start in zip(windows, starts, strict=True))
        found_BV = decoder.step(tokens_at(step, 2))


@pytest.mark.parametrize("rows", [[[0, 3, 4]], [[0, 3, 4], [5] * 14, [0]]], ids=["one", "many"])
def test_all_layers_are_counted_while_rows_end(rows: list[list[int]]) -> None:
    model = random_model(**ROTARY, d_value=8)
    steering = Steering(dict.fromkeys(range(2), torch.ones(32)))
    decoder = SteeredDecoder(CachedDecoder(model), model, steering)
    decoder.start(rows)
    for step in range(20):
        if step == 4 and len(rows) > 1:
            decoder.keep([2, 0])
        decoder.step(tokens_at(step, len(rows) if len(rows) == 1 or step < 4 else 2))
    assert steering.holds
    assert steering.num_edits >= 2 * 20


def test_steering_that_does_not_act_is_noticed() -> None:
    model = random_model()
    steering = Steering({0: torch.ones(32)})
    decoder = SteeredDecoder(CachedDecoder(deepcopy(model)), model, steering)
    with pytest.raises(Exception, match="no activation reached"):
        decoder.start([[0, 3, 4]])
    assert not steering.holds
    partly = Steering({0: torch.ones(32)})
    decoder = SteeredDecoder(CachedDecoder(model), model, partly)
    decoder.start([[0, 3, 4]])
    partly.first = 2  # the decoder expects another set of positions from here on
    decoder.keep([0])
    partly.num_edits -= 1
    assert not partly.holds
